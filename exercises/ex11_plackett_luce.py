"""Exercise 11 · Rankings instead of pairs: Plackett-Luce on four completions.

Equation: p(τ|y₁…y_K, x) = Π_k exp r(x,y_τ(k)) / Σ_{j≥k} exp r(x,y_τ(j)), best first  (Eq. 18, A.3)
Kind:     WRITE, a stretch
Time:     35 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex11.py -x --seed STUDENT_NUMBER

A ranking is a row of choices: the best of all, then the best of the rest, and so on. With two
completions it is Bradley-Terry, and the loss is Eq. 7. The implicit reward r̂ = β log π_θ/π_ref
takes the place of r. Completions of equal reward have no order between them: they leave the
ranking, and a group with fewer than two left is skipped.

Once the checks are green, train with your own:
    python train.py --loss plackett-luce --dpo-module exercises/ex11_plackett_luce.py

G groups, K completions in each.
"""

from torch import Tensor


def ranking_logps(scores: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 18: scores r (G, K), ranked by rewards (G, K) -> log p (G,), tied (G, K) bool.

    tied is true at the completions that share their reward with another of the group; neither
    their own factor nor their place in a sum counts.
    """
    raise NotImplementedError("exercise 11: write Eq. 18")


def plackett_luce_loss(pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor,
                       beta: float) -> tuple[Tensor, Tensor, dict[str, int]]:
    """A.3: log π_θ and log π_ref (G*K,), rewards (G, K), β -> what follows.

    losses (G',), one for each group with at least two completions left; r̂ (G*K,), detached; and
    {"tied": completions left out, "skipped": groups left out}.
    """
    raise NotImplementedError("exercise 11: write the loss")
