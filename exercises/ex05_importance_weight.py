"""Exercise 05 · The gradient of Eq. 7: each pair pushes, and a weight says how hard.

Equation: ∇L = -β E[w (∇log π(y_w) - ∇log π(y_l))],  w = σ(r̂(x,y_l) - r̂(x,y_w)) = σ(-m)
Kind:     WRITE and PREDICT (Section 4, the gradient)
Time:     25 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex05.py -x --seed STUDENT_NUMBER

m = r̂(x,y_w) - r̂(x,y_l) is a pair's margin, with β already in it. First commit PREDICTION. Then
write DPO's weight; then a loss with this gradient for any weight: a surrogate whose value means
nothing and whose gradient is -β w (∇log π(y_w) - ∇log π(y_l)).

Both then stand in for the originals:
    python train.py --stage dpo --weight exercises/ex05_importance_weight.py:sigmoid_weight
    python train.py --stage dpo --weight hinge --dpo-module exercises/ex05_importance_weight.py

B completions, N pairs.
"""

from collections.abc import Callable

from torch import Tensor

PREDICTION = None  # the weight of every pair at step 0, where π_θ = π_ref: a number


def sigmoid_weight(margin: Tensor, beta: float) -> Tensor:
    """DPO's weight: margins m (N,) and β -> w (N,). Minus the slope of -log σ(m)."""
    raise NotImplementedError("exercise 05: write the weight")


def weighted_loss(pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor,
                  beta: float, weight: Callable[[Tensor, float], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss for any weight(margin (N,), beta) -> (N,); the rest as in exercise 03.

    -> losses (N,), whose gradient in log π(y_w) is -β w, in log π(y_l) β w; r̂ (B,), detached.
    """
    raise NotImplementedError("exercise 05: write the surrogate")
