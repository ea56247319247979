"""Checks of exercise 10: the formulas against models that count, and against real tensors."""

from collections import Counter

import torch
from ex10_account import METHODS


class Counting:
    """A model that logs each call."""

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def __getattr__(self, event: str):
        return lambda: self.log.append((self.name, event))


def run(method: str, K: int, epochs: int) -> list[tuple[str, str]]:
    log = []
    METHODS[method](*(Counting(name, log) for name in ("policy", "reference", "reward")), K, epochs)
    return log


def draw(rng) -> tuple[int, int]:
    """K completions (3 to 9), epochs (2 to 5)."""
    return int(torch.randint(3, 10, (), generator=rng)), int(torch.randint(2, 6, (), generator=rng))


def policy_passes(impl, rng, method: str, hint: str) -> None:
    K, epochs = draw(rng)
    counts, said = Counter(run(method, K, epochs)), impl.policy_passes(method, K, epochs)
    wanted = counts["policy", "forward"], counts["policy", "backward"]
    assert tuple(said) == wanted, f"{method}, K = {K}, {epochs} epochs: your formula gives " \
        f"{tuple(said)} forwards and backwards of the policy, it makes {wanted}: {hint}"


def test_pairs(impl, rng):
    K, _ = draw(rng)
    wanted = sum(i < j for i in range(K) for j in range(K))
    assert impl.pairs(K) == wanted, f"K = {K}: your formula gives {impl.pairs(K)} pairs, " \
        f"there are {wanted}: the reward orders a pair, so it counts once"


def test_a_group_goes_once(impl, rng):
    policy_passes(impl, rng, "dpo_by_group", "a completion goes forward once per epoch, however "
                  "many pairs it is in")


def test_a_pair_goes_by_itself(impl, rng):
    policy_passes(impl, rng, "dpo_by_pair", "each pair takes two passes, so a completion has "
                  "K - 1 of them per epoch")


def test_ppo_goes_before_it_updates(impl, rng):
    policy_passes(impl, rng, "ppo", "the log-probs and values before the update take "
                  "one more forward per completion")


def test_the_frozen_models_go_forward(impl, rng):
    K, epochs = draw(rng)
    for method in METHODS:
        counts, said = Counter(run(method, K, epochs)), impl.frozen_passes(method, K, epochs)
        wanted = counts["reference", "forward"], counts["reward", "forward"]
        assert tuple(said) == wanted, f"{method}, K = {K}, {epochs} epochs: your formula " \
            f"gives {tuple(said)} forwards of π_ref and r_φ, it makes {wanted}: dpo_by_group " \
            "writes log π_ref to disk, so it is computed once, not once per epoch"


def test_more_pairs_share_a_forward(impl, rng):
    K, _ = draw(rng)
    wanted = K / (K * (K - 1) // 2)
    assert abs(impl.forwards_per_pair(K) - wanted) < 1e-9, f"K = {K}: your formula gives " \
        f"{impl.forwards_per_pair(K):g} forwards per pair, it is {wanted:g}: K forwards serve " \
        "all pairs, so with more completions a pair costs less"


def test_models_in_memory(impl):
    for method in METHODS:
        log = run(method, 2, 1)
        trained = {name for name, event in log if event == "backward"}
        unloaded = {name for name, event in log if event == "unload"}
        wanted = len(trained), len({name for name, _ in log} - trained - unloaded)
        said = tuple(impl.models_in_memory(method))
        assert said == wanted, f"{method}: you say {said} trained and frozen models, there are " \
            f"{wanted}: PPO also holds π_ref and r_φ; dpo_by_group unloads π_ref once it has scored"


def test_bytes(impl, rng):
    sizes = torch.randint(3, 9, (2,), generator=rng).tolist()
    for moments, optimizer in (1, torch.optim.RMSprop), (2, torch.optim.AdamW):
        model, frozen = (torch.nn.Linear(*sizes, bias=False) for _ in range(2))
        steps = optimizer(model.parameters())
        model(torch.ones(sizes[0])).sum().backward()
        steps.step()
        state = [x for s in steps.state.values() for x in s.values() if x.dim()]  # not the step
        kept = model.weight, model.weight.grad, frozen.weight, *state
        params = model.weight.numel()
        wanted, said = sum(4 * x.numel() for x in kept), impl.training_bytes(params, 1, 1, moments)
        assert said == wanted, f"{optimizer.__name__}, {params} parameters, one model trained, " \
            f"one frozen: your formula gives {said} bytes, there are {wanted}: a trained model " \
            "has weights, a gradient and the optimizer's moments, a frozen one has weights only"
