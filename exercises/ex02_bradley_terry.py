"""Exercise 02 · From rewards to preferences, and back by maximum likelihood.

Equation: p*(y₁ ≻ y₂|x) = exp r(y₁) / (exp r(y₁) + exp r(y₂));  L_R = -log p(y_w ≻ y_l)  (Eqs. 1, 2)
Kind:     WRITE
Time:     15 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex02.py -x --seed STUDENT_NUMBER

Bradley and Terry's model says how often one completion is preferred to another when each has a
reward. As printed, Eq. 1 overflows for a reward of 1000; as a sigmoid it does not. Its negative
log-likelihood, Eq. 2, trains a reward model; with another reward in it, Eq. 2 becomes Eq. 7.

B completions, N pairs.
"""

from torch import Tensor


def preference_probability(r1: Tensor, r2: Tensor) -> Tensor:
    """Eq. 1: rewards of any equal shapes -> the probability that y₁ is preferred, as shaped."""
    raise NotImplementedError("exercise 02: write Eq. 1")


def reward_model_loss(rewards: Tensor, yw_idxs: Tensor, yl_idxs: Tensor) -> Tensor:
    """Eq. 2, one loss a pair: rewards (B,), winners (N,) and losers (N,) as indices -> (N,).

    It must stay finite in float32 for a pair that is wrong by 1000.
    """
    raise NotImplementedError("exercise 02: write Eq. 2")
