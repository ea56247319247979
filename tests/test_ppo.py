"""Laws of experiments/ppo.py: formulas worked by hand, small enumerated worlds, and the stages."""

import copy
import io
import json
import math
import shutil
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KILL, TINY, Waits, command, folder, same, stopped_and_finished
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dpo
from experiments.ppo import (PPO, PPOConfig, ValueModel, adaptive_kl_beta, clipped_objective, gae,
                             token_rewards, train_ppo, whiten)
from gpt import GPT, GPTConfig, pad_rows
from job import Job
from support.runs import Run
from support.settings import parse

EOS = 3
PROMPTS = [[0], [1, 2], [2, 1, 0]] * 8


def tiny(seed: int, vocab: int = 4, sharpness: float = 10.0) -> GPT:
    """A GPT whose distributions are far from uniform, but give no token a tiny probability."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab, n_ctx=8, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        model.wte.weight.mul_(sharpness)
        model.wpe.weight.mul_(sharpness)
    return model


def count_zeros(prompts, completions):
    return torch.tensor([float(ids.count(0)) for ids in completions])


def trainer(reward=count_zeros, max_new_tokens=4, policy=None, reference=None, batch_size=512,
            **config) -> PPO:
    config = PPOConfig(**dict(steps=6, lr=1e-3, warmup=1) | config)

    def sample(model, prompts, seed):
        return model.sample(prompts, max_new_tokens, EOS, seed)

    return PPO(policy or tiny(0), reference or tiny(0), reward, sample, EOS, config,
               batch_size=batch_size)


def parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def random_batch(seed: int, B: int = 5, T: int = 7):
    """Three (B, T) tensors that are not 0 outside the mask, and a mask of completions."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 3, (B,), generator=g)
    ends = torch.randint(4, T + 1, (B,), generator=g)
    return *torch.randn(3, B, T, generator=g), dpo.completion_mask(first, ends, T)


# ------------------------------------------------------------------------------ token rewards

def test_eq03_the_token_rewards_of_a_completion_sum_to_its_one_sample_value():
    logps, ref_logps, scores, mask = random_batch(0)
    scores, beta = scores[:, 0], 0.3
    rewards = token_rewards(scores, logps, ref_logps, mask, beta)
    log_ratio = ((logps - ref_logps) * mask).sum(1)
    assert torch.allclose(rewards.sum(1), scores - beta * log_ratio, atol=1e-6)
    assert (rewards[~mask] == 0).all(), "the prompt or the padding has a reward"


def test_only_the_last_token_gets_the_score():
    logps, ref_logps, scores, mask = random_batch(1)
    paid = token_rewards(scores[:, 0], logps, logps, mask, 0.3)
    for row, score, m in zip(paid, scores[:, 0], mask):
        last = int(m.nonzero().max())
        assert row[last] == score and row.count_nonzero() == 1


def test_eq03_is_the_mean_of_token_rewards_over_every_y():
    g = torch.Generator().manual_seed(2)
    logp, ref_logp = torch.randn(2, 6, generator=g).log_softmax(-1)
    scores, mask = torch.randn(6, generator=g), torch.ones(6, 1, dtype=torch.bool)
    paid = token_rewards(scores, logp[:, None], ref_logp[:, None], mask, 0.7)[:, 0]
    want = dpo.objective(logp, ref_logp, scores, 0.7)
    assert torch.allclose((logp.exp() * paid).sum(), want, atol=1e-6)


# ------------------------------------------------------------------------------ GAE

def test_gae_of_an_episode_worked_by_hand():
    # a prompt token, three tokens of y, one of padding; γ = 1/2, λ = 1/2, so γλ = 1/4
    rewards = torch.tensor([[9.0, 1.0, 0.0, 4.0, 9.0]])
    values = torch.tensor([[9.0, 2.0, 4.0, 2.0, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    # δ = 1 + 4/2 - 2 = 1;  0 + 2/2 - 4 = -3;  4 + 0 - 2 = 2
    # A = 1 - 2.5/4 = 0.375;  -3 + 2/4 = -2.5;  2
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0, 0.375, -2.5, 2, 0]]
    assert returns.tolist() == [[0, 2.375, 1.5, 4, 0]]


def test_gae_at_lambda_1_is_the_return_minus_the_value():
    rewards, values, _, mask = random_batch(3)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_come, atol=1e-5)
    assert torch.allclose(advantages, (to_come - values) * mask, atol=1e-5)


def test_gae_at_lambda_0_is_the_td_error():
    rewards, values, _, mask = random_batch(4)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    for b, t in mask.nonzero().tolist():
        after = values[b, t + 1] if t + 1 < mask.size(1) and mask[b, t + 1] else 0.0
        want = float(rewards[b, t] + 0.9 * after - values[b, t])
        assert float(advantages[b, t]) == pytest.approx(want, abs=1e-5)


def test_values_outside_the_mask_change_nothing():
    rewards, values, other, mask = random_batch(5)
    once = gae(rewards, values, mask, 0.9, 0.8)
    trash = torch.where(mask, 0, torch.tensor(math.nan))
    again = gae(rewards + trash, values + trash, mask, 0.9, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    assert torch.equal(whiten(rewards, mask), whiten(rewards + trash, mask))
    loss, clipped = clipped_objective(values, rewards, other, mask, 0.2)
    loss_too, clipped_too = clipped_objective(values + trash, rewards, other, mask, 0.2)
    assert loss == loss_too and clipped == clipped_too


def test_gae_is_float32_for_every_input_dtype():
    rewards, values, _, mask = random_batch(6)
    advantages, returns = gae(rewards.bfloat16(), values.bfloat16(), mask, 1.0, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32


def test_whiten_gives_mean_0_and_variance_1_at_any_scale_of_the_reward():
    x, _, _, mask = random_batch(7)
    white = whiten(x, mask)
    assert abs(float(white[mask].mean())) < 1e-6 and (white[~mask] == 0).all()
    assert float(white[mask].var(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(whiten(5 * x + 3, mask), white, atol=1e-5)


# ------------------------------------------------------------------------------ the objective

def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    logps, _, advantages, mask = random_batch(8)
    logps.requires_grad_()
    loss, clipped = clipped_objective(logps, logps.detach(), advantages, mask, 0.2)
    loss.backward()
    assert torch.allclose(logps.grad, -advantages * mask) and clipped == 0
    assert torch.allclose(loss, -(advantages * mask).sum())


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.5, 2.0, 0.0),  # moved with A by more than ε: no gradient
    (0.5, -2.0, 0.0),
    (0.5, 2.0, -1.0),  # moved against A by more than ε: the gradient -ρA remains
    (1.5, -2.0, 3.0),
    (1.1, 2.0, -2.2),  # moved by less than ε
    (0.9, -2.0, 1.8),
])
def test_the_clip_stops_only_tokens_that_moved_with_their_advantage(ratio, advantage, slope):
    old = torch.tensor([[0.0, -1.0]])
    logps = (old + math.log(ratio)).requires_grad_()
    mask = torch.tensor([[False, True]])
    loss, clipped = clipped_objective(logps, old, torch.tensor([[7.0, advantage]]), mask, 0.2)
    loss.backward()
    assert logps.grad[0].tolist() == pytest.approx([0.0, slope], abs=1e-5)
    assert bool(clipped) == (slope == 0)


# ------------------------------------------------------------------------------ control of β

def test_beta_rises_when_kl_is_above_the_target_falls_below_it_and_stays_at_it():
    beta = adaptive_kl_beta
    assert beta(0.1, 2.0, 2.0, 2.0) == 0.1
    assert beta(0.1, 2.2, 2.2, 2.0) > 0.1 > beta(0.1, 1.8, 1.8, 2.0)
    assert beta(0.1, 2.0, 1.5, 2.0) > 0.1 > beta(0.1, 2.0, 2.5, 2.0), "the second term is missing"
    assert beta(0.2, 2.2, 2.1, 2.0) == pytest.approx(2 * beta(0.1, 2.2, 2.1, 2.0))


@pytest.mark.parametrize("kl, last", [(1e9, 0), (-5, 1e9), (0, 0), (0, 1e9)])
def test_beta_changes_by_a_factor_of_at_most_one_and_a_half(kl, last):
    assert 1 / 1.5 < adaptive_kl_beta(1.0, kl, last, 0.5) < 1.5


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0, 3.0])
def test_kl_reaches_its_target_although_it_follows_beta_five_iterations_later(target):
    beta, kl, last, seen = 0.1, 0.0, 0.0, []
    for _ in range(30):
        beta, last = adaptive_kl_beta(beta, kl, last, target), kl
        kl += (0.13 / beta - kl) / 5  # a policy whose optimum has KL 1 at β = 0.13
        seen.append(kl / target)
    assert all(abs(x - 1) < 0.2 for x in seen[20:]), f"it still oscillates: {seen}"


def test_beta_is_adapted_only_after_the_warm_up_and_only_with_a_target():
    ppo, last = trainer(target=0.5, warmup=2), 0.0
    rows = [ppo.step(step, PROMPTS, step) for step in range(6)]
    assert rows[0]["beta"] == rows[1]["beta"] == rows[2]["beta"] == ppo.config.beta
    for row, after in zip(rows[2:], rows[3:]):
        assert after["beta"] == adaptive_kl_beta(row["beta"], row["kl"], last, 0.5) != row["beta"]
        last = row["kl"]
    fixed = trainer(warmup=0)
    assert [fixed.step(step, PROMPTS, step)["beta"] for step in range(3)] == [0.1] * 3


def test_training_uses_the_adapted_beta_and_not_the_configured_one():
    """Two trainers with the same adapted β take equal steps, whatever β was configured."""
    steps = []
    for configured, controlled in ((0.1, 0.9), (0.9, 0.9), (0.1, 0.1)):
        ppo = trainer(policy=tiny(1), beta=configured)
        ppo.beta = controlled
        steps.append((ppo.step(2, PROMPTS, 0), parameters(ppo.policy)))
    assert steps[0][0] == steps[1][0] and torch.equal(steps[0][1], steps[1][1])
    assert steps[0][0]["value_loss"] != steps[2][0]["value_loss"], "β has no effect on the returns"


# ------------------------------------------------------------------------------ the networks

def test_the_value_before_a_token_depends_on_all_earlier_tokens_and_on_no_later_one():
    model = ValueModel.from_gpt(tiny(0), 8)
    assert not model(torch.tensor([[0, 1, 2]])).any(), "its head must start at 0"
    torch.nn.init.normal_(model.score.weight)
    idx = torch.tensor([[0, 1, 2, 0, 1, 3]])
    values = model(idx)
    assert values.shape == idx.shape and values[0, 0] == 0
    for t in range(1, idx.size(1)):
        other = idx.clone()
        other[0, t:] = (other[0, t:] + 1) % 4
        changed = (model(other) != values)[0]
        assert not changed[: t + 1].any(), f"a value before token {t} depends on it"
        assert changed[t + 1 :].all(), f"a value after token {t} does not depend on it"


def test_values_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert ValueModel.from_gpt(tiny(0), 8)(torch.tensor([[0, 1, 2]])).dtype == torch.float32


def test_during_warm_up_only_the_value_network_learns():
    ppo = trainer(warmup=2)
    before, reference = parameters(ppo.policy), parameters(ppo.reference)
    for step in range(2):
        values = parameters(ppo.value)
        assert ppo.step(step, PROMPTS, step)["kl"] == 0, "π is not π_ref, bit for bit"
        assert torch.equal(parameters(ppo.policy), before)
        assert not torch.equal(parameters(ppo.value), values)
    ppo.step(2, PROMPTS, 2)
    assert not torch.equal(parameters(ppo.policy), before)
    assert torch.equal(parameters(ppo.reference), reference)


def test_the_value_network_learns_the_expected_score():
    ppo = trainer(lambda prompts, completions: torch.tensor([float(len(p)) for p in prompts]),
                  steps=25, warmup=25, value_lr=1e-2)
    rows = [ppo.step(step, PROMPTS, step) for step in range(25)]
    assert rows[-1]["explained_variance"] > 0.95 and rows[-1]["value_loss"] < 0.02
    assert abs(rows[0]["explained_variance"]) < 1e-6, "a constant explains nothing"


# ------------------------------------------------------------------------------ the step

def one_update(**config) -> PPO:
    """A trainer without warm-up that takes one optimizer step per iteration."""
    return trainer(**dict(warmup=0, minibatches=1, epochs=1) | config)


def calls_of_update(ppo: PPO) -> list[tuple]:
    """The arguments of each `update` of one step, which is taken."""
    calls, update = [], ppo.update
    ppo.update = lambda *args: calls.append(args) or update(*args)
    ppo.step(0, PROMPTS, 0)
    ppo.update = update
    return calls


def rollouts(ppo: PPO):
    """The last step's idx (N, T), mask (N, T) and scores (N,)."""
    idx, prompt_lens, lengths = pad_rows(*ppo.last)
    return idx, dpo.completion_mask(prompt_lens, lengths, idx.size(1)), count_zeros(*ppo.last)


def test_the_first_gradient_of_the_value_network_is_the_mean_over_tokens():
    ppo = one_update(lam=1.0)
    row = ppo.step(0, PROMPTS, 0)  # V = 0 and π = π_ref: every token's return is the score
    idx, mask, scores = rollouts(ppo)
    scores = (scores[:, None] * mask)[mask]
    with torch.no_grad():
        hidden = ppo.reference.hidden(idx[:, :-1])[mask[:, 1:]]
    slopes = (scores[:, None] * hidden).mean(0).square().sum() + scores.mean().square()
    assert row["value_grad_norm"] == pytest.approx(float(slopes.sqrt()), rel=1e-4)
    assert row["value_loss"] == pytest.approx(float(scores.square().mean() / 2), rel=1e-4)


def test_the_first_gradient_of_the_policy_is_the_policy_gradient_of_whitened_advantages():
    """∇ of -1/n Σ A log π over the n tokens of the batch, A of mean 0 and variance 1."""
    ppo = one_update(gamma=0.9, lam=0.5)
    row = ppo.step(0, PROMPTS, 0)
    idx, mask, scores = rollouts(ppo)
    zeros = torch.zeros(mask.shape)  # of V, and of log π - log π_ref
    rewards = token_rewards(scores, zeros, zeros, mask, 0.1)
    advantages = whiten(gae(rewards, zeros, mask, 0.9, 0.5)[0], mask)
    model = copy.deepcopy(ppo.reference)
    (-(advantages * model.token_logps(idx, mask)).sum() / mask.sum()).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["policy_loss"] == pytest.approx(0, abs=1e-6), "-Σ A / n at ratio 1"


@pytest.mark.parametrize("step, decay", [(0, 1), (3, 1), (4, 2 / 3), (5, 1 / 3)])
def test_the_policys_rate_falls_over_the_second_half_and_the_value_networks_does_not(step, decay):
    """Adam's first step moves each parameter by the learning rate, for every gradient."""
    ppo = one_update(lr=1e-3, value_lr=4e-3)
    before = parameters(ppo.policy), parameters(ppo.value)
    ppo.step(step, PROMPTS, 0)
    moved = [float((parameters(model) - old).abs().max())
             for model, old in zip((ppo.policy, ppo.value), before)]
    assert moved == pytest.approx([1e-3 * decay, 4e-3], rel=1e-3)


def test_gradients_are_clipped_to_max_norm():
    ppo = one_update(max_norm=1e-10)  # far below Adam's ε of 1e-8, so the step is near 0
    before = parameters(ppo.policy), parameters(ppo.value)
    ppo.step(0, PROMPTS, 0)
    for model, old in zip((ppo.policy, ppo.value), before):
        assert float((parameters(model) - old).abs().max()) < 0.02 * ppo.config.lr


def test_the_objective_is_clipped_at_the_configured_epsilon():
    clipped = [trainer(warmup=0, minibatches=1, lr=1e-2, clip=clip).step(0, PROMPTS, 0)
               ["clip_fraction"] for clip in (1e-4, 0.2, 1e3)]
    assert clipped[0] > clipped[1] > clipped[2] == 0


def test_approx_kl_is_kl_from_the_old_policy_to_the_new():
    """Over both epochs' steps: 0 before the first one, E[ρ - 1 - log ρ] before the second."""
    config = dict(warmup=0, minibatches=1, lr=3e-3)
    first, both = trainer(epochs=1, **config), trainer(epochs=2, **config)
    first.step(0, PROMPTS, 0)
    row = both.step(0, PROMPTS, 0)
    idx, mask, _ = rollouts(first)
    with torch.no_grad():
        new, old = (m.token_logps(idx, mask)[mask] for m in (first.policy, first.reference))
    kl = ((new - old).exp() - 1 - (new - old)).mean()
    assert row["approx_kl"] == pytest.approx(float(kl) / 2, rel=1e-3) and kl > 1e-4


def test_a_resumed_run_is_bit_for_bit_the_same():
    whole, first, second = (trainer(target=0.5) for _ in range(3))
    rows = [whole.step(step, PROMPTS, step) for step in range(5)]
    again = [first.step(step, PROMPTS, step) for step in range(3)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    torch.manual_seed(99)  # no draw may come from the global generator
    again += [second.step(step, PROMPTS, step) for step in (3, 4)]
    assert again == rows and second.last == whole.last
    assert torch.equal(parameters(second.policy), parameters(whole.policy))
    assert torch.equal(parameters(second.value), parameters(whole.value))
    assert len({row["beta"] for row in rows}) > 2


def test_another_seed_gives_other_samples():
    ppo = trainer()
    seen = [(ppo.step(0, PROMPTS, seed), ppo.last[1])[1] for seed in (0, 2**48 - 1)]
    assert seen[0] != seen[1]


def test_every_epoch_passes_over_all_samples_in_another_order():
    parts = [args[2].tolist() for args in calls_of_update(trainer(epochs=3, minibatches=4))]
    assert [len(part) for part in parts] == [len(PROMPTS) / 4] * 12
    epochs = [sum(parts[i : i + 4], []) for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(len(PROMPTS))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])


def test_small_batches_take_the_same_step():
    rows = [one_update(batch_size=n).step(0, PROMPTS, 0) for n in (512, 5)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-6)
    assert rows[0]["clip_fraction"] == rows[0]["approx_kl"] == 0, "a ratio did not start at 1"


@pytest.mark.parametrize("warmup", [True, False])
def test_what_is_outside_the_mask_does_not_change_an_update(warmup):
    logs, after = [], []
    for trash in (0.0, math.nan):
        ppo = one_update()
        [((idx, mask, *others), lengths, part, _)] = calls_of_update(ppo)
        others = [x.masked_fill(~mask, trash) for x in others]
        logs.append(ppo.update((idx, mask, *others), lengths, part, warmup))
        after.append(torch.cat([parameters(ppo.policy), parameters(ppo.value)]))
    assert torch.equal(*logs) and torch.equal(*after) and logs[0].isfinite().all()


@pytest.mark.parametrize("warmup", [True, False])
def test_an_update_waits_for_a_gpu_once_per_batch_and_not_at_all_in_warm_up(warmup):
    ppo = one_update(batch_size=8 * 5)  # 24 rollouts in 5 batches of an update
    [(*args, _)] = calls_of_update(ppo)
    with Waits() as found:
        ppo.update(*args, warmup)
    lengths = {"_local_scalar_dense": 5}  # each batch's longest length, which is on the CPU
    assert Counter(found) == lengths | ({} if warmup else {"nonzero": 5})  # of token_logps


class Moves(TorchDispatchMode):
    """`with Moves() as moves:` moves.found lists the operations on tensors of two devices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **kwargs or {})
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        self.found += [f.__name__] * (len({x.device for x in tensors}) > 1)
        return out


def test_an_update_moves_one_index_per_batch_to_the_device(monkeypatch):
    """On the device "meta". An index on the CPU would be copied once for each indexed tensor."""
    ppo = one_update(batch_size=8 * 5)
    [(rollouts, lengths, part, _)] = calls_of_update(ppo)
    ppo.device, ppo.optimizer.step = torch.device("meta"), lambda: None
    ppo.policy.to("meta"), ppo.value.to("meta")
    rollouts = [x.to("meta") for x in rollouts]
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # no "meta"
    with Moves() as moves:
        ppo.update(rollouts, lengths, part, warmup=True)
    assert moves.found == ["_to_copy.default"] * (1 + 5), "the update's and the batches' indices"


@pytest.mark.parametrize("epochs, minibatches", [(1, 1), (3, 4)])
def test_apart_from_its_updates_a_step_waits_for_a_gpu_few_times(epochs, minibatches):
    ppo = trainer(warmup=0, epochs=epochs, minibatches=minibatches)
    completions = ppo.sample(ppo.policy, PROMPTS, 0)
    ppo.sample = lambda *_: completions
    with Waits() as found:
        ppo.step(0, PROMPTS, 0)
    assert len(found) - 2 * epochs * minibatches <= 12, found


def test_the_logged_row_describes_the_samples_of_its_step():
    ppo = trainer()
    row = [ppo.step(step, PROMPTS, step) for step in range(2)][1]
    prompts, completions = ppo.last
    assert prompts == PROMPTS
    assert row["reward"] == pytest.approx(float(count_zeros(*ppo.last).mean()))
    assert row["length"] == sum(map(len, completions)) / len(completions)
    assert row["eos"] == sum(ids[-1] == EOS for ids in completions) / len(completions)


def test_a_score_that_is_not_finite_shows_in_the_row():
    row = trainer(lambda p, c: torch.full((len(p),), math.nan), warmup=0).step(0, PROMPTS, 0)
    assert math.isnan(row["policy_loss"]) and math.isnan(row["value_loss"])


# ------------------------------------------------------------------------------ Eq. 4

def enumerated(model: GPT, prompt, max_new_tokens: int, y=()) -> dict:
    """{y: log π(y|prompt)} of every completion, by recursion."""
    if len(y) == max_new_tokens or EOS in y:
        return {y: 0.0}
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *y]]))[0, -1].double().log_softmax(-1).tolist()
    return {ids: logp[v] + rest for v in range(len(logp))
            for ids, rest in enumerated(model, prompt, max_new_tokens, (*y, v)).items()}


@pytest.mark.parametrize("max_new_tokens, beta, steps", [(1, 0.5, 30), (2, 1.0, 40)])
def test_eq04_ppo_finds_the_optimal_policy(max_new_tokens, beta, steps):
    """On a random reward table over every completion of one token (a bandit), and of two."""
    seed = max_new_tokens
    reference, prompts = tiny(seed, sharpness=9.0), [[0], [1, 2]]
    ys = list(enumerated(reference, prompts[0], max_new_tokens))
    table = torch.randn(len(prompts), len(ys), generator=torch.Generator().manual_seed(seed))

    def reward(prompts_, completions):
        return torch.stack([table[prompts.index(p), ys.index(tuple(y))]
                            for p, y in zip(prompts_, completions)])

    ppo = trainer(reward, max_new_tokens, copy.deepcopy(reference), reference, warmup=2,
                  lr=1e-2, value_lr=1e-2, beta=beta, steps=steps)
    before = parameters(reference)
    for step in range(steps):
        ppo.step(step, prompts * (64 * max_new_tokens), step)
    assert torch.equal(parameters(reference), before), "π_ref was changed"
    logps, ref_logps = (
        torch.tensor([list(enumerated(m, p, max_new_tokens).values()) for p in prompts])
        for m in (ppo.policy, reference))
    optimum = dpo.optimal_policy(ref_logps, table, beta)
    assert dpo.kl_divergence(optimum, ref_logps).max() > 0.1, "too easy: π_ref solves it"
    both = dpo.kl_divergence(optimum, logps).max(), dpo.kl_divergence(logps, optimum).max()
    assert max(both) < 1e-2, f"PPO is {both} nats from π_r"


# ------------------------------------------------------------------------------ the stages


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory) -> SimpleNamespace:
    """train_ppo as stage ppo-gt on the chain's groups, by a reward that records its prompts."""
    argv = ["--stage", "ppo-gt", *TINY, "--ppo-steps", "5", "--ppo-rollouts", "13",
            "--ppo-value-lr", "0", "--out", str(chain.out), "--data", str(chain.data)]
    _, preset, _, cfg = parse(argv, False)
    job, seen = Job(preset, cfg, argv), []

    def reward(prompts, completions):
        seen.append(prompts)
        return torch.tensor([float(len(y)) for y in completions])

    run = Run(tmp_path_factory.mktemp("ppo") / "ppo-gt", {}, {}, about=dict(stage="ppo-gt"))
    with run:
        train_ppo(job, run, reward, 7.0)
    return SimpleNamespace(job=job, rows=[row for row in run.metrics() if "eval" not in row],
                           prompts=[p for p in seen if len(p) == 13])


def test_each_iteration_draws_its_own_training_prompts(trained):
    train = [trained.job.groups.prompt_ids[i] for i in trained.job.split[0]]
    assert len(trained.prompts) == trained.job.cfg.ppo_steps
    assert all(p in train for prompts in trained.prompts for p in prompts)
    assert all(a != b for a, b in zip(trained.prompts, trained.prompts[1:]))


def test_the_stage_passes_its_settings_to_ppo(trained):
    rows, cfg = trained.rows, trained.job.cfg
    assert rows[0]["beta"] == pytest.approx(7 * cfg.ppo_beta, rel=1e-5), "β is in units of the sd"
    assert rows[3]["beta"] != rows[2]["beta"], "β is not adapted to --ppo-target"
    rates = [row["lr"] / cfg.ppo_lr for row in rows]
    assert rates == pytest.approx([1, 1, 1, 1, 2 / 3], rel=1e-4), "no decay over --ppo-steps"
    assert all(abs(row["explained_variance"]) < 1e-5 for row in rows), "--ppo-value-lr is not 0"


@pytest.fixture(scope="module")
def finished(chain, tmp_path_factory):
    """--out with ppo and ppo-gt made at TINY."""
    out = tmp_path_factory.mktemp("ppo") / "out"
    for stage in ("sft", "groups"):
        shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
    for stage in ("ppo", "ppo-gt"):
        result = command("--stage", stage, *TINY, "--out", out, "--data", chain.data)
        assert result.code == 0, result.err
    return out


@pytest.mark.parametrize("stage", ["ppo", "ppo-gt"])
def test_ppo_logs_the_learned_reward_and_the_true_reward_separately(finished, stage):
    run = folder(finished, stage)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "eval" not in row]
    assert len(steps) == 4 and (run / "curves.png").exists()
    if stage == "ppo":
        assert all(abs(r["reward"] - r["true_reward"]) > 1e-3 for r in steps), "r_φ is not r*"
        sd = json.loads((folder(finished, "rm") / "report.json").read_text())["sd"]
    else:
        groups = (folder(finished, "groups") / "groups.jsonl").read_text().splitlines()
        sd = float(np.std([json.loads(line)["rewards"] for line in groups]))
    assert steps[0]["beta"] == pytest.approx(0.3 * sd, rel=1e-4)


def test_a_killed_run_resumes_bit_for_bit(chain, copied, finished):
    out = copied("sft", "groups")
    stopped_and_finished(
        [*TINY, "--stage", "ppo-gt", "--data", chain.data, "--out", out], (KILL, "log"),
        (KILL, "log", "", 2), (KILL, "torn", "resume.pt", 2), (KILL, "torn", "model.pt"))
    same(folder(out, "ppo-gt"), folder(finished, "ppo-gt"))
