"""Exercise 09 · The KL of sequences: how far a policy is from its reference, sampled and exact.

Equation: KL(π‖π_ref) = E_{y~π} Σ_t KL(π(·|x,y_<t)‖π_ref(·|x,y_<t)) = E_{y~π} log π(y|x)/π_ref(y|x)
Kind:     WRITE (the x-axis of Figure 2; Section 6.1 sums the KL of each step)
Time:     30 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex09.py -x --tb=short --seed STUDENT_NUMBER

Two estimates from one sample y ~ π have the same mean. The exact one sums over the vocabulary at
each step along y; the sampled one uses only the token that was drawn. Near π_ref the exact one
varies far less. Both are computed with loops below; write them without a loop. Then estimate the KL
of two small models, and find a token on which the sampled estimate is negative, although no KL is.

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

    chain (V, V): row i has the log-probs of the token after token i. The prompt is token 0, and
    token 0 also ends a text. chain[idx] are the log-probs (n, T, V) along the texts.
    """
    idx = torch.zeros(n, T, dtype=torch.long)
    for t in range(1, T):
        idx[:, t] = torch.multinomial(chain[idx[:, t - 1]].exp(), 1, generator=rng)[:, 0]
    ended = idx[:, 1:] == 0
    return idx, torch.where(ended.any(1), ended.int().argmax(1) + 2, T)


def kl_divergence(logp: Tensor, logq: Tensor, dim: int = -1) -> Tensor:
    """KL(p ‖ q) over `dim`, in nats: log p and log q (..., V) -> (...).

    A token with p = 0, that is log p = -inf, adds 0.
    """
    raise NotImplementedError("exercise 09: write kl_divergence")


def sequence_kl(logp: Tensor, logq: Tensor, idx: Tensor, prompt_lens: Tensor,
                lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The same result as sequence_kl_in_loops: exact (B,), sampled (B,)."""
    raise NotImplementedError("exercise 09: write sequence_kl")


def estimate(policy: Tensor, reference: Tensor, n: int,
             rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """KL(π ‖ π_ref) of two chains (V, V) from n texts: exact (n,), sampled (n,).

    Which of the two models must the texts be sampled from?
    """
    raise NotImplementedError("exercise 09: write estimate")


def negative_token(logp: Tensor, logq: Tensor) -> int:
    """Two distributions (V,), not equal -> a token on which the sampled estimate is negative."""
    raise NotImplementedError("exercise 09: write negative_token")
