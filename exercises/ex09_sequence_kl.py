"""Exercise 09 · How far the policy went: sequence KL, sampled and exact.

Equation: KL(π‖π_ref) = E_{y~π} Σ_t KL(π(·|x,y_<t)‖π_ref(·|x,y_<t)) = E_{y~π} log π(y|x)/π_ref(y|x)
Kind:     WRITE (the x-axis of Figure 2; Section 6.1 sums the KL of each step)
Time:     30 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex09.py -x --seed STUDENT_NUMBER

Two estimates from one sample y ~ π have the same mean. "Exact" sums over the vocabulary at each
step along y; "sampled" looks only at the token that was drawn. Near π_ref the first varies far
less. A slow version of both is below; write it without a loop. Then estimate the KL of two models
of your own, and show how the sampled one can be negative, which no KL is.

B sequences, T tokens, V vocabulary.
"""

import torch
from torch import Tensor

QUESTION = "why can the sampled estimate be negative, and why is its mean not?"
EXPLANATION = None  # two sentences: QUESTION


def sequence_kl_in_loops(logp: Tensor, logq: Tensor, idx: Tensor, prompt_lens: Tensor,
                         lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The specification. logp, logq (B, T, V): log π and log π_ref of the token after each
    position; idx (B, T); prompt_lens, lengths (B,) -> exact (B,), sampled (B,), in nats."""
    exact, sampled = [], []
    for b in range(len(idx)):
        e = s = torch.zeros((), dtype=logp.dtype)
        for t in range(int(prompt_lens[b]), int(lengths[b])):  # the tokens of y
            p, q = logp[b, t - 1], logq[b, t - 1]
            for v in range(len(p)):
                e = e + p[v].exp() * (p[v] - q[v])
            s = s + p[idx[b, t]] - q[idx[b, t]]
        exact.append(e)
        sampled.append(s)
    return torch.stack(exact), torch.stack(sampled)


def sample(chain: Tensor, n: int, rng: torch.Generator, T: int = 6) -> tuple[Tensor, Tensor]:
    """n texts from a model that sees one token back: idx (n, T), lengths (n,).

    chain (V, V): row i is the log-probs of what follows token i. The prompt is token 0, which also
    ends a text. chain[idx] are the log-probs (n, T, V) along the texts.
    """
    idx = torch.zeros(n, T, dtype=torch.long)
    for t in range(1, T):
        idx[:, t] = torch.multinomial(chain[idx[:, t - 1]].exp(), 1, generator=rng)[:, 0]
    ended = idx[:, 1:] == 0
    return idx, torch.where(ended.any(1), ended.int().argmax(1) + 2, T)


def kl_divergence(logp: Tensor, logq: Tensor, dim: int = -1) -> Tensor:
    """KL(p ‖ q) over `dim`, in nats: (..., V), (..., V) -> (...)."""
    raise NotImplementedError("exercise 09: write kl_divergence")


def sequence_kl(logp: Tensor, logq: Tensor, idx: Tensor, prompt_lens: Tensor,
                lengths: Tensor) -> tuple[Tensor, Tensor]:
    """As sequence_kl_in_loops, and equal to it: exact (B,), sampled (B,)."""
    raise NotImplementedError("exercise 09: write sequence_kl")


def estimate(policy: Tensor, reference: Tensor, n: int,
             rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """KL(π ‖ π_ref) of two chains (V, V) from n texts: exact (n,), sampled (n,). Whose texts?"""
    raise NotImplementedError("exercise 09: write estimate")


def negative_token(logp: Tensor, logq: Tensor) -> int:
    """Two distributions (V,), not equal -> a token on which the sampled estimate is negative."""
    raise NotImplementedError("exercise 09: write negative_token")
