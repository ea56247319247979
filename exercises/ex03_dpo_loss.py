"""Exercise 03 · Eq. 7: a language model that is trained as a reward model.

Equation: L = -log σ(β h(y_w) - β h(y_l)),  h(y) = log π_θ(y|x) - log π_ref(y|x)  (Eq. 7)
Kind:     WRITE
Time:     20 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex03.py -x --tb=short --seed STUDENT_NUMBER

The signature is that of Appendix B. Each completion is scored once, and index vectors name the
pairs, so four completions serve six pairs. Beside the losses, return the implicit rewards r̂ = β h
of all completions, detached: they are logged, and need no gradient.

When the checks pass, train with your own loss:
    python train.py --preset toy --stage dpo --dpo-module exercises/ex03_dpo_loss.py

B completions, N pairs.
"""

from torch import Tensor


def dpo_loss(pi_logps: Tensor, ref_logps: Tensor, yw_idxs: Tensor, yl_idxs: Tensor,
             beta: float) -> tuple[Tensor, Tensor]:
    """Eq. 7: log π_θ(y|x) (B,), log π_ref(y|x) (B,), winners (N,), losers (N,), β.

    -> losses (N,), one per pair, and rewards r̂ (B,), one per completion.
    """
    raise NotImplementedError("exercise 03: write Eq. 7")
