"""Exercise 04 · The policy that Eq. 3 asks for, on four responses, and the reward it hides.

Equation: max_π E r(x,y) - β KL(π‖π_ref);  π_r = π_ref exp(r/β) / Z;  r = β log π_r/π_ref + β log Z
Kind:     WRITE (Eqs. 3, 4, 5)
Time:     25 minutes
Machine:  one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex04.py -x --seed STUDENT_NUMBER

With four responses to a prompt everything can be written down. Eq. 4 tilts the reference towards
reward; Eq. 5 reads it backwards: the policy says what reward it is the answer to. For text, Z
sums over every possible response and cannot be had. In a difference of two rewards it cancels, and
that is how Eq. 7 comes about.

P prompts, K responses to each. Everything in logs.
"""

from torch import Tensor


def objective(logp: Tensor, ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 3's value of a policy: log π, log π_ref and r (P, K) -> (P,). KL is KL(π ‖ π_ref)."""
    raise NotImplementedError("exercise 04: write Eq. 3")


def optimal_policy(ref_logp: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Eq. 4: log π_ref (P, K) and r (P, K) -> log π_r (P, K)."""
    raise NotImplementedError("exercise 04: write Eq. 4")


def implicit_reward(pi_logps: Tensor, ref_logps: Tensor, beta: float,
                    log_z: float | Tensor = 0.0) -> Tensor:
    """Eq. 5: log π_r (P, K), log π_ref (P, K) and log Z(x) (P, 1) -> r (P, K)."""
    raise NotImplementedError("exercise 04: write Eq. 5")
