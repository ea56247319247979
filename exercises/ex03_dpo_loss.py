"""Exercise 03 · Eq. 7: the reward model that is a language model.

Equation: L = -log σ(β h(y_w) - β h(y_l)),  h(y) = log π_θ(y|x) - log π_ref(y|x)  (Eq. 7)
Kind:     WRITE
Time:     20 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex03.py -x --seed STUDENT_NUMBER

The signature is Appendix B's. Each completion is scored once, and index vectors name the pairs,
so four completions serve six pairs. Beside the losses it returns the implicit rewards r̂ = β h of
every completion, detached: they are for the eye and must carry no gradient.

Once the checks are green, train with your own loss:
    python train.py --stage dpo --dpo-module exercises/ex03_dpo_loss.py

B completions, N pairs.
"""

from torch import Tensor


def dpo_loss(pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 7: log π_θ(y|x) (B,), log π_ref(y|x) (B,), winners (N,), losers (N,), β.

    -> losses (N,), one a pair, and rewards r̂ (B,), one a completion.
    """
    raise NotImplementedError("exercise 03: write Eq. 7")
