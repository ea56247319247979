"""Exercise 10 · The cost of DPO and of PPO: models in memory, and passes per pair.

Equation: passes per prompt, passes per pair and bytes, as functions of K completions and E epochs
Kind:     ACCOUNT (Section 4, Section 5.2, Appendix B)
Time:     25 minutes (an estimate)
Machine:  paper, and one CPU core; the checks take 7 CPU seconds
Check:    python -m pytest exercises/test_ex10.py -x --tb=short --seed STUDENT_NUMBER

The three functions below say which passes three methods make for one prompt with K completions in E
epochs. Each forward and backward is of one sequence. The completions differ in reward, so no pair
is a tie. Give the totals as formulas. The checks run the three functions with models that count.
"""

from itertools import combinations


def dpo_by_group(policy, reference, reward, K: int, epochs: int) -> None:
    """This repository: one forward per completion; Appendix B's index vectors make the pairs."""
    for _ in range(K):
        reference.forward()  # log π_ref is written to disk
    reference.unload()
    for _ in range(epochs):
        for _ in range(K):
            policy.forward()
        for _ in range(K):
            policy.backward()


def dpo_by_pair(policy, reference, reward, K: int, epochs: int) -> None:
    """Most published code: each pair by itself, with π_ref in memory beside π_θ."""
    for _ in range(epochs):
        for _pair in combinations(range(K), 2):
            for _ in ("y_w", "y_l"):
                policy.forward()
                reference.forward()
            for _ in ("y_w", "y_l"):
                policy.backward()


def ppo(policy, reference, reward, K: int, epochs: int) -> None:
    """A round of PPO on K fresh samples. The value is a second head on the policy. (In this
    repository, experiments/ppo.py, it is a network of its own: one more model in memory, and one
    more pass beside each pass of π_θ.)"""
    for _ in range(K):
        policy.sample()  # token by token
        policy.forward()  # the log-probs before the update, and the values
        reference.forward()  # for the KL
        reward.forward()
    for _ in range(epochs):
        for _ in range(K):
            policy.forward()
            policy.backward()


METHODS = {"dpo_by_group": dpo_by_group, "dpo_by_pair": dpo_by_pair, "ppo": ppo}


def pairs(K: int) -> int:
    """The number of pairs of K completions without a tie."""
    raise NotImplementedError("exercise 10: count the pairs")


def policy_passes(method: str, K: int, epochs: int) -> tuple[int, int]:
    """Forwards and backwards of the policy in a method of METHODS, without its sampling."""
    raise NotImplementedError("exercise 10: count the policy's passes")


def frozen_passes(method: str, K: int, epochs: int) -> tuple[int, int]:
    """Forwards of π_ref and of the reward model r_φ."""
    raise NotImplementedError("exercise 10: count the frozen models' passes")


def forwards_per_pair(K: int) -> float:
    """The policy's forwards per pair in one epoch of dpo_by_group."""
    raise NotImplementedError("exercise 10: forwards per pair")


def models_in_memory(method: str) -> tuple[int, int]:
    """How many trained and how many frozen models are in memory while the policy trains."""
    raise NotImplementedError("exercise 10: count the models")


def training_bytes(params: int, trained: int, frozen: int, moments: int) -> int:
    """Bytes of the models, `params` float32 numbers each, of their gradients and optimizer state.

    moments: numbers that the optimizer keeps per parameter, 1 for RMSprop, 2 for AdamW.
    Activations are not counted.
    """
    raise NotImplementedError("exercise 10: count the bytes")
