"""Exercise 02 · From rewards to preferences, and back by maximum likelihood.

Equation: p*(y₁ ≻ y₂|x) = exp r(y₁) / (exp r(y₁) + exp r(y₂));  L_R = -log p(y_w ≻ y_l)  (Eqs. 1, 2)
Kind:     WRITE
Time:     15 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex02.py -x --tb=short --seed STUDENT_NUMBER

The model of Bradley and Terry gives the probability that one completion is preferred to another,
from the reward of each. As Eq. 1 is printed, it overflows for a reward of 1000; written as a
sigmoid, it does not. Eq. 2 is its negative log-likelihood and trains a reward model. With the
implicit reward of exercise 03 in place of r, Eq. 2 becomes Eq. 7.

B completions, N pairs.
"""

from torch import Tensor


def preference_probability(r1: Tensor, r2: Tensor) -> Tensor:
    """Eq. 1: rewards, two tensors of one shape -> p(y₁ ≻ y₂), of that shape."""
    raise NotImplementedError("exercise 02: write Eq. 1")


def reward_model_loss(rewards: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Eq. 2: rewards (B,), indices of winners (N,) and of losers (N,) -> one loss per pair (N,).

    It must stay finite in float32 where the loser's reward is 1000 above the winner's.
    """
    raise NotImplementedError("exercise 02: write Eq. 2")
