"""Exercise 05 · The gradient of Eq. 7: each pair pushes, and its weight says how hard.

Equation: ∇L = -β E[w (∇log π(y_w) - ∇log π(y_l))],  w = σ(r̂(x,y_l) - r̂(x,y_w)) = σ(-m)
Kind:     WRITE and PREDICT (Section 4, the gradient)
Time:     25 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex05.py -x --tb=short --seed STUDENT_NUMBER

m = r̂(x,y_w) - r̂(x,y_l) is the margin of a pair; β is already in it. First commit PREDICTION. Then
write DPO's weight. Then write a loss that has this gradient for any weight. It is a surrogate: its
value has no meaning, and its gradient is -β w (∇log π(y_w) - ∇log π(y_l)).

Both can then train the model in place of the originals:
    python train.py --preset toy --weight exercises/ex05_importance_weight.py:sigmoid_weight
    python train.py --preset toy --weight hinge --dpo-module exercises/ex05_importance_weight.py

B completions, N pairs.
"""

from collections.abc import Callable

from torch import Tensor

PREDICTION = None  # the weight of every pair at step 0, where π_θ = π_ref: a number


def sigmoid_weight(margin: Tensor, beta: float) -> Tensor:
    """DPO's weight: margins m (N,) and β -> w (N,), minus the slope of -log σ(m).

    It must stay finite in float32 for margins of 1000 and of -1000.
    """
    raise NotImplementedError("exercise 05: write the weight")


def weighted_loss(pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor,
                  beta: float, weight: Callable[[Tensor, float], Tensor]) -> tuple[Tensor, Tensor]:
    """A loss for any weight(margin (N,), beta) -> (N,); the other arguments as in exercise 03.

    -> losses (N,), whose gradient is -β w in log π(y_w) and β w in log π(y_l); r̂ (B,), detached.
    """
    raise NotImplementedError("exercise 05: write the surrogate")
