"""The reference solution: dpo.py's own functions, and short functions that call them.

SOLUTIONS: {exercise: {name: function or constant}}. An explanation here only shows the form.
"""

import math
from types import SimpleNamespace

import torch
from ex08_order_the_frontier import BETAS
from ex09_sequence_kl import sample
from ex12_label_noise import RUNS

import dpo
import evaluate
import gpt

EXPLANATION = "These two sentences only show the form that the check asks for. Write your own, " \
              "because a teacher reads them."


class Logits:
    """Takes the place of a GPT: its hidden states are logits, and its head is the identity."""

    score_block = staticmethod(gpt.GPT.score_block)

    def __init__(self, logits):
        self.logits, V = logits, logits.size(-1)
        self.config = SimpleNamespace(vocab_size=V)
        self.wte = SimpleNamespace(weight=torch.eye(V, dtype=logits.dtype))

    def hidden(self, idx):
        return self.logits[:, : idx.size(1)]

    def head(self, hidden):
        return hidden


def logits_to_token_logps(logits, idx):
    every = torch.ones_like(idx, dtype=torch.bool)
    every[:, 0] = False  # nothing predicts the first token
    return gpt.GPT.token_logps(Logits(logits), idx, every)


def at_step_0() -> float:
    return float(dpo.WEIGHTS["sigmoid"](torch.zeros(()), 0.1))


def by_kl() -> list[float]:
    """BETAS in the order of the KL of Eq. 4's policy, on eight responses."""
    ref = torch.zeros(8, dtype=torch.float64).log_softmax(-1)
    r = torch.linspace(0, 1, 8, dtype=torch.float64)
    return sorted(BETAS, key=lambda beta: dpo.kl_divergence(dpo.optimal_policy(ref, r, beta), ref))


def sequence_kl(logp, logq, idx, prompt_lens, lengths):
    exact, sampled, _ = evaluate.sequence_kl(Logits(logp), Logits(logq), idx, prompt_lens, lengths)
    return exact, sampled


def estimate(policy, reference, n, rng):
    idx, lengths = sample(policy, n, rng)
    return sequence_kl(policy[idx], reference[idx], idx, torch.ones_like(lengths), lengths)


def negative_token(logp, logq):
    return int((logp - logq).argmin())


def pairs(K):
    return len(dpo.preference_pairs(torch.arange(K)[None])[0])


def policy_passes(method, K, epochs):
    return {"dpo_by_group": (K * epochs, K * epochs),
            "dpo_by_pair": (2 * pairs(K) * epochs, 2 * pairs(K) * epochs),
            "ppo": (K * (1 + epochs), K * epochs)}[method]


def frozen_passes(method, K, epochs):
    return {"dpo_by_group": (K, 0),
            "dpo_by_pair": (2 * pairs(K) * epochs, 0),
            "ppo": (K, K)}[method]


def forwards_per_pair(K):
    return K / pairs(K)


def models_in_memory(method):
    return {"dpo_by_group": (1, 0), "dpo_by_pair": (1, 1), "ppo": (1, 2)}[method]


def training_bytes(params, trained, frozen, moments):
    return 4 * params * (trained * (2 + moments) + frozen)


def best_margin(noise):
    return math.log((1 - noise) / noise)


def by_wrong_labels() -> list[str]:
    """RUNS in the order of the share of labels that are wrong or, in cDPO, taken to be wrong."""
    def share(name, eps=dpo.CDPO_EPS):
        noise = 0.2 * name.startswith("noise")
        return noise * (1 - eps) + (1 - noise) * eps if "cDPO" in name else noise
    return sorted(RUNS, key=share, reverse=True)


def named(*functions) -> dict:
    return {f.__name__: f for f in functions}


SOLUTIONS = {
    "01": named(logits_to_token_logps, dpo.completion_logps),
    "02": named(dpo.preference_probability, dpo.reward_model_loss),
    "03": named(dpo.dpo_loss),
    "04": named(dpo.objective, dpo.optimal_policy, dpo.implicit_reward),
    "05": named(dpo.weighted_loss) | dict(sigmoid_weight=dpo.WEIGHTS["sigmoid"],
                                          PREDICTION=at_step_0()),
    "06": dict(constant_weight=dpo.WEIGHTS["constant"], EXPLANATION=EXPLANATION,
               PREDICTION=dict(kl="constant", ref_ppl="constant", grammatical="dpo",
                               logp_chosen="dpo", logp_rejected="dpo")),
    "07": named(dpo.preference_pairs),
    "08": dict(PREDICTION=by_kl(), EXPLANATION=EXPLANATION),
    "09": named(dpo.kl_divergence, sequence_kl, estimate, negative_token)
    | dict(EXPLANATION=EXPLANATION),
    "10": named(pairs, policy_passes, frozen_passes, forwards_per_pair, models_in_memory,
                training_bytes),
    "11": named(dpo.ranking_logps, dpo.plackett_luce_loss),
    "12": named(best_margin) | dict(PREDICTION=by_wrong_labels(), EXPLANATION=EXPLANATION),
}
