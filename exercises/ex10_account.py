"""Exercise 10 · The bill: models in memory and passes per pair, DPO against PPO.

Equation: passes a prompt, passes a pair and bytes, as functions of K completions and E epochs
Kind:     ACCOUNT (Section 4, Section 5.2, Appendix B)
Time:     25 minutes
Machine:  paper, and one CPU core; the checks take 2 s
Check:    python -m pytest exercises/test_ex10.py -x --seed STUDENT_NUMBER

Three methods spend what the three functions below spend, on one prompt with K completions, for E
epochs. Each forward and backward is of one sequence; each completion differs in reward from the
others, so that there is no tie. Give the totals as formulas. The checks run the functions with
models that count.
"""

from itertools import combinations


def dpo_by_group(policy, reference, reward, K: int, epochs: int) -> None:
    """This repository: each completion forward once, Appendix B's index vectors make the pairs."""
    for _ in range(K):
        reference.forward()  # log π_ref is written to disk, once
    reference.unload()
    for _ in range(epochs):
        for _ in range(K):
            policy.forward()
        for _ in range(K):
            policy.backward()


def dpo_by_pair(policy, reference, reward, K: int, epochs: int) -> None:
    """Most published code: each pair by itself, π_ref beside π_θ."""
    for _ in range(epochs):
        for _pair in combinations(range(K), 2):
            for _ in ("y_w", "y_l"):
                policy.forward()
                reference.forward()
            for _ in ("y_w", "y_l"):
                policy.backward()


def ppo(policy, reference, reward, K: int, epochs: int) -> None:
    """A round of PPO on K fresh samples; the value is a second head on the policy. (Here
    experiments/ppo.py gives it a network of its own: one more model in memory, and its pass beside
    each of π_θ's.)"""
    for _ in range(K):
        policy.sample()  # token by token
        policy.forward()  # the old log-probs and the values
        reference.forward()  # for the KL
        reward.forward()
    for _ in range(epochs):
        for _ in range(K):
            policy.forward()
            policy.backward()


METHODS = {"dpo_by_group": dpo_by_group, "dpo_by_pair": dpo_by_pair, "ppo": ppo}


def pairs(K: int) -> int:
    """Pairs of K completions without a tie."""
    raise NotImplementedError("exercise 10: count the pairs")


def policy_passes(method: str, K: int, epochs: int) -> tuple[int, int]:
    """Forwards and backwards of the policy, by a method of METHODS; samples not counted."""
    raise NotImplementedError("exercise 10: count the policy's passes")


def frozen_passes(method: str, K: int, epochs: int) -> tuple[int, int]:
    """Forwards of π_ref and of the reward model r_φ."""
    raise NotImplementedError("exercise 10: count the frozen models' passes")


def forwards_per_pair(K: int) -> float:
    """Policy forwards for one pair in one epoch, dpo_by_group."""
    raise NotImplementedError("exercise 10: forwards per pair")


def models_in_memory(method: str) -> tuple[int, int]:
    """Models that are trained and models that are frozen, in memory while the policy trains."""
    raise NotImplementedError("exercise 10: count the models")


def training_bytes(params: int, trained: int, frozen: int, moments: int) -> int:
    """Bytes of models of `params` float32 numbers each, their gradients and optimizer state.

    moments: numbers kept per parameter, 1 for RMSprop, 2 for AdamW. Activations are not counted.
    """
    raise NotImplementedError("exercise 10: count the bytes")
