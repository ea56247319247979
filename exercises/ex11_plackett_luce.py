"""Exercise 11 · Rankings in place of pairs: Plackett-Luce on four completions.

Equation: p(τ|y₁…y_K, x) = Π_k exp r(x,y_τ(k)) / Σ_{j≥k} exp r(x,y_τ(j)), best first  (Eq. 18, A.3)
Kind:     WRITE, the hardest of all
Time:     35 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex11.py -x --tb=short --seed STUDENT_NUMBER

A ranking is a series of choices: the best of all, then the best of the rest, and so on. With two
completions the model is Bradley and Terry's, and the loss is Eq. 7. The implicit reward
r̂ = β log π_θ/π_ref takes the place of r. Completions of equal reward have no order: all of them
leave the ranking, and a group with fewer than two left is skipped.

When the checks pass, train with your own:
    python train.py --preset toy --loss plackett-luce --dpo-module exercises/ex11_plackett_luce.py

G groups, K completions in each.
"""

from torch import Tensor


def ranking_logps(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 18: scores r (G, K), ranked by rewards (G, K) -> log p (G,), tied (G, K) bool.

    tied is true for completions that share their reward with another one of the group. They have
    no factor of their own, and are left out of the sums.
    """
    raise NotImplementedError("exercise 11: write Eq. 18")


def plackett_luce_loss(pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor,
                       beta: float) -> tuple[Tensor, Tensor, dict[str, int]]:
    """A.3: log π_θ and log π_ref (G*K,), rewards (G, K), β -> three results.

    losses (G',), one for each group with at least two completions left; r̂ (G*K,), detached;
    {"tied": number of completions left out, "skipped": number of groups left out}.
    """
    raise NotImplementedError("exercise 11: write the loss")
