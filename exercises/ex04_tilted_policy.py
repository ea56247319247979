"""Exercise 04 · The optimal policy of Eq. 3, on four responses, and the reward behind a policy.

Equation: max_π E r(x,y) - β KL(π‖π_ref);  π_r = π_ref exp(r/β) / Z;  r = β log π_r/π_ref + β log Z
Kind:     WRITE (Eqs. 3, 4, 5)
Time:     25 minutes (an estimate)
Machine:  one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex04.py -x --tb=short --seed STUDENT_NUMBER

With four responses to a prompt, everything can be computed. Eq. 4 raises the reference's
probability of responses with a high reward. Eq. 5 is Eq. 4 solved for r: it gives the reward for
which a policy is optimal. For text, Z is a sum over every possible response and cannot be computed.
In the difference of two rewards it cancels. That step leads to Eq. 7.

P prompts, K responses to each. All probabilities are logs.
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
