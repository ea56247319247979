"""One point of the frontier: what a policy's samples are worth, and how far it went for them.

Samples a policy on held-out prompts; mean true reward, sequence KL, length, repetition, each with
its standard error; and the optimum of Eq. 3, which no policy can pass. Knows nothing of training.

B sequences, T tokens, V vocabulary, M scored tokens, P prompts, K completions a prompt.
"""

import math

import numpy as np
import torch

from dpo import completion_mask, kl_divergence, optimal_policy
from gpt import GPT, alike, pad_rows

BLOCK_BYTES = 2**26  # of float32 log-probs over the vocabulary, made at a time


@torch.no_grad()
def sequence_kl(policy: GPT, reference: GPT, idx, prompt_lens, lengths,
                temperature: float = 1.0) -> torch.Tensor:
    """KL(π ‖ π_ref) in nats per completion, two ways, on completions that π sampled.

    idx (B, T), prompt_lens (B,), lengths (B,) -> (3, B) float64 on the CPU:
    kl: the exact KL of each step's distribution over the vocabulary, summed along the sample,
        the decision to end included, the prompt and all after the end left out;
    kl_mc: log π(y|x) - log π_ref(y|x), the one-sample estimate. Same mean; near π_ref a far
        larger variance (far from it there is no law); often negative on one sample;
    ref_nll: -log π_ref(y|x).
    π is the policy at the `temperature` that it was sampled at (0: all on the token taken);
    π_ref is the reference at 1. With another temperature than the samples' neither is an estimate.
    """
    mask = completion_mask(prompt_lens, lengths, idx.size(1)).to(idx.device)[:, 1:]
    rows = mask.nonzero()[:, 0]  # (M,) the sequence of each scored token
    hidden = [m.hidden(idx[:, :-1])[mask] for m in (policy, reference)]  # (M, C) each
    targets = idx[:, 1:][mask]
    out = torch.zeros(3, len(idx), dtype=torch.float64, device=idx.device)
    step = max(1, BLOCK_BYTES // (4 * policy.config.vocab_size))
    for i in range(0, len(rows), step):
        part = slice(i, i + step)
        at = targets[part, None]
        logits, ref_logits = (m.head(h[part]).float() for m, h in zip((policy, reference), hidden))
        logp = (logits / temperature).log_softmax(-1) if temperature else \
            torch.full_like(logits, -math.inf).scatter(-1, at, 0.0)
        logq = ref_logits.log_softmax(-1)
        ref_logp = logq.gather(-1, at)[:, 0]
        kls = kl_divergence(logp, logq), logp.gather(-1, at)[:, 0] - ref_logp, -ref_logp
        for total, value in zip(out, kls):
            total.index_add_(0, rows[part], value.double())
    return out.cpu()


def repetition(completions) -> float:
    """Mean share of a completion's trigrams that it has had before: 0 for varied text, near 1
    for one word over and over."""
    def share(ids):
        grams = list(zip(ids, ids[1:], ids[2:]))
        return 1 - len(set(grams)) / len(grams) if grams else 0.0

    return sum(map(share, completions)) / len(completions)


def distinct2(completions) -> float:
    """Distinct bigrams over bigrams, all completions together. Falls with the number of samples:
    compare at equal numbers only."""
    grams = [g for ids in completions for g in zip(ids, ids[1:])]
    return len(set(grams)) / max(1, len(grams))


def standard_error(x) -> float:
    return float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan


def evaluate(policy: GPT, reference: GPT, prompts, reward, eos: int, max_new: int, seed: int,
             temperature: float = 1.0, grammatical=None, completions=None, rows: int = 512) -> dict:
    """One point: the policy's samples on `prompts` (or `completions`, already sampled), judged.

    reward(prompts, completions) -> (P,), or None where there is no r*; grammatical alike -> the
    share of sentences in the language. The same seed gives every policy the same uniforms.
    Reward in [0, 1]; KL in nats per completion; length in tokens, its end included; eos: the
    share that ended itself; ref_ppl: exp of all NLL under π_ref over all tokens.
    """
    if completions is None:
        completions = policy.sample(prompts, max_new, eos, seed, temperature, rows=rows)
    device = policy.wte.weight.device
    kls = torch.empty(3, len(prompts), dtype=torch.float64)
    ends = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions)])
    for part in alike(ends, device, rows):
        padded = pad_rows([prompts[i] for i in part], [completions[i] for i in part])
        kls[:, part] = sequence_kl(policy, reference, *(x.to(device) for x in padded),
                                   temperature=temperature)
    lengths = torch.tensor([float(len(c)) for c in completions])
    point = dict(
        kl=float(kls[0].mean()), kl_se=standard_error(kls[0]),
        kl_mc=float(kls[1].mean()), kl_mc_se=standard_error(kls[1]),
        length=float(lengths.mean()), length_se=standard_error(lengths),
        eos=sum(c[-1] == eos for c in completions) / len(completions),
        distinct2=distinct2(completions), repetition=repetition(completions),
        ref_ppl=math.exp(min(700.0, float(kls[2].sum() / lengths.sum()))),
        reward=None, reward_se=None, grammatical=None,
        temperature=temperature, samples=len(prompts), completions=completions,
        kls=[round(x, 4) for x in kls[0].tolist()])
    if reward is not None:
        rewards = reward(prompts, completions)
        point |= dict(reward=float(rewards.mean()), reward_se=standard_error(rewards),
                      rewards=[round(x, 4) for x in rewards.tolist()])
    if grammatical is not None:
        point["grammatical"] = grammatical(prompts, completions)
    return point


def optimal_frontier(rewards, betas) -> list[dict]:
    """Eq. 4's π_r for each beta, from reference samples alone: rewards (P, K), K a prompt.

    Self-normalised reweighting: w, exp(r / β) over its prompt's sum, stands for π_r / π_ref, with
    1 / K for π_ref. Then reward = Σ w r and KL = Σ w log(K w), means over prompts, one β for all.
    No training, and no policy lies above what it estimates, so it also tests the KL estimator.
    `ess`, the effective number of samples a prompt (K at β = ∞, 1 when one has all the weight),
    says where to stop believing it: the KL cannot pass log K.
    """
    P, K = rewards.shape
    rewards = rewards.double()
    uniform = torch.full_like(rewards, -math.log(K))
    curve = []
    for beta in betas:
        logw = optimal_policy(uniform, rewards, beta)  # (P, K)
        w = logw.exp()
        r, kl = (w * rewards).sum(-1), kl_divergence(logw, uniform)
        curve.append(dict(beta=beta, reward=float(r.mean()), reward_se=standard_error(r),
                          kl=float(kl.mean()), kl_se=standard_error(kl),
                          ess=float((1 / w.square().sum(-1)).mean()),
                          rewards=[round(x, 4) for x in r.tolist()],
                          kls=[round(x, 4) for x in kl.tolist()]))
    return curve


def unbiased(rewards, betas) -> list[dict]:
    """optimal_frontier of (P, K) without its bias of order 1/K: twice the whole less its halves.

    By the jackknife, prompt by prompt. Without it Best-of-N near N = K lies above the curve.
    """
    whole, *halves = (optimal_frontier(part, betas)
                      for part in (rewards, rewards[:, ::2], rewards[:, 1::2]))
    for point, one, other in zip(whole, *halves):
        for mean, each in (("reward", "rewards"), ("kl", "kls")):
            values = 2 * np.array(point[each]) - (np.array(one[each]) + other[each]) / 2
            point |= {mean: float(values.mean()), each: values.round(4).tolist(),
                      mean + "_se": standard_error(values)}
    return whole


def optimal_reward(curve: list[dict], kl: float) -> float | None:
    """The curve's reward at `kl`, between its points with ess >= 3; None outside them.

    An estimate, and near the end of that range a little low: few samples hold the weight."""
    points = sorted((p["kl"], p["reward"]) for p in curve if p["ess"] >= 3)
    for (a, ra), (b, rb) in zip(points, points[1:]):
        if a <= kl <= b:
            return ra + (rb - ra) * (kl - a) / (b - a) if b > a else ra
    return None


def in_order(a, b):
    """1 where a > b, 1/2 where they are equal, of any equal shapes."""
    return (a > b) + 0.5 * (a == b)


def rank_correlation(implicit, rewards) -> float:
    """Spearman's, within a prompt, averaged over prompts: two (P, K) -> [-1, 1].

    r̂ is free up to f(x), so its order across prompts means nothing. Tied ranks are averaged.
    """
    def ranks(x):
        return in_order(x[:, :, None], x[:, None, :]).sum(-1)

    a, b = (ranks(x) - ranks(x).mean(-1, keepdim=True) for x in (implicit, rewards))
    return float(((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-9)).mean())


def correlation(implicit, rewards) -> float:
    """Pearson's, within a prompt, all prompts together: two (P, K) -> [-1, 1].

    Near π_ref it is a policy's share of the optimal gain at its KL: with h = log π/π_ref the gain
    is Cov(h, r) and the KL Var(h)/2, both under π_ref, so what h holds beside r costs KL and buys
    no reward.
    """
    a, b = (x - x.mean(-1, keepdim=True) for x in (implicit, rewards))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))
