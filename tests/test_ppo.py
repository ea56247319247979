"""Laws of ppo.py: each formula by hand, and worlds small enough to enumerate, solved by PPO."""

import copy
import io
import math

import pytest
import torch

import dpo
from gpt import GPT, GPTConfig, pad_rows
from ppo import PPO, PPOConfig, ValueModel, clipped_objective, gae, next_beta, token_rewards, whiten

EOS = 3
PROMPTS = [[0], [1, 2], [2, 1, 0]] * 8


def tiny(seed: int, vocab: int = 4, sharpness: float = 10.0) -> GPT:
    """A GPT whose distributions are far from uniform, yet leave every token likely enough."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab, n_ctx=8, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        model.wte.weight.mul_(sharpness)
        model.wpe.weight.mul_(sharpness)
    return model


def count_zeros(prompts, completions):
    return torch.tensor([float(ids.count(0)) for ids in completions])


def trainer(reward=count_zeros, context=None, fp16=False, rows=512, **config) -> PPO:
    config = PPOConfig(**dict(steps=6, max_new=4, lr=1e-3, warmup=1) | config)
    more = {} if context is None else dict(context=context)
    return PPO(tiny(0), tiny(0), reward, EOS, config, fp16=fp16, rows=rows, **more)


def bits(model) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in model.parameters())


def random_batch(seed: int, B: int = 5, T: int = 7):
    """Three (B, T) tensors that are not 0 outside the mask, and a mask as completions have it."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 3, (B,), generator=g)
    ends = torch.randint(4, T + 1, (B,), generator=g)
    return *torch.randn(3, B, T, generator=g), dpo.completion_mask(first, ends, T)


# ------------------------------------------------------------------------------ token rewards

def test_a_row_sums_to_eq3s_one_sample_value():
    logps, ref_logps, scores, mask = random_batch(0)
    scores, beta = scores[:, 0], 0.3
    rewards = token_rewards(scores, logps, ref_logps, mask, beta)
    log_ratio = ((logps - ref_logps) * mask).sum(1)
    assert torch.allclose(rewards.sum(1), scores - beta * log_ratio, atol=1e-6)
    assert (rewards[~mask] == 0).all(), "the prompt or the padding is paid"


def test_the_score_falls_on_the_last_token_alone():
    logps, ref_logps, scores, mask = random_batch(1)
    paid = token_rewards(scores[:, 0], logps, logps, mask, 0.3)
    for row, score, m in zip(paid, scores[:, 0], mask):
        last = int(m.nonzero().max())
        assert row[last] == score and row.count_nonzero() == 1


def test_its_mean_over_every_y_is_eq3():
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


def test_gae_at_lambda_1_is_the_return_less_the_value():
    rewards, values, _, mask = random_batch(3)
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    rewards = rewards * mask
    to_come = rewards.flip(1).cumsum(1).flip(1) * mask
    assert torch.allclose(returns, to_come, atol=1e-5)
    assert torch.allclose(advantages, (to_come - values) * mask, atol=1e-5)


def test_gae_at_lambda_0_is_the_td_error():
    rewards, values, _, mask = random_batch(4)
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    for b, t in mask.nonzero().tolist():
        after = values[b, t + 1] if t + 1 < mask.size(1) and mask[b, t + 1] else 0.0
        want = float(rewards[b, t] + 0.9 * after - values[b, t])
        assert float(advantages[b, t]) == pytest.approx(want, abs=1e-5)


def test_what_is_outside_the_mask_never_matters():
    rewards, values, other, mask = random_batch(5)
    once = gae(rewards, values, mask, 0.9, 0.8)
    trash = torch.where(mask, 0, torch.tensor(math.nan))
    again = gae(rewards + trash, values + trash, mask, 0.9, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    assert torch.equal(whiten(rewards, mask), whiten(rewards + trash, mask))
    loss, held = clipped_objective(values, rewards, other, mask, 0.2)
    loss_too, held_too = clipped_objective(values + trash, rewards, other, mask, 0.2)
    assert loss == loss_too and held == held_too


def test_gae_is_float32_whatever_comes_in():
    rewards, values, _, mask = random_batch(6)
    advantages, returns = gae(rewards.bfloat16(), values.bfloat16(), mask, 1.0, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32


def test_whitened_is_of_mean_0_and_variance_1_and_blind_to_the_rewards_scale():
    x, _, _, mask = random_batch(7)
    white = whiten(x, mask)
    assert abs(float(white[mask].mean())) < 1e-6 and (white[~mask] == 0).all()
    assert float(white[mask].var(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(whiten(5 * x + 3, mask), white, atol=1e-5)


# ------------------------------------------------------------------------------ the objective

def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    logps, _, advantages, mask = random_batch(8)
    logps.requires_grad_()
    loss, held = clipped_objective(logps, logps.detach(), advantages, mask, 0.2)
    loss.backward()
    assert torch.allclose(logps.grad, -advantages * mask) and held == 0
    assert torch.allclose(loss, -(advantages * mask).sum())


@pytest.mark.parametrize("ratio, advantage, slope", [
    (1.5, 2.0, 0.0),  # already likelier by more than the clip: no further
    (0.5, -2.0, 0.0),  # already less likely: no further
    (0.5, 2.0, -1.0),  # went the wrong way: pushed back, -ρA
    (1.5, -2.0, 3.0),
    (1.1, 2.0, -2.2),  # inside the clip
    (0.9, -2.0, 1.8),
])
def test_the_clip_stops_a_push_further_and_never_a_push_back(ratio, advantage, slope):
    old = torch.tensor([[0.0, -1.0]])
    logps = (old + math.log(ratio)).requires_grad_()
    mask = torch.tensor([[False, True]])
    loss, held = clipped_objective(logps, old, torch.tensor([[7.0, advantage]]), mask, 0.2)
    loss.backward()
    assert logps.grad[0].tolist() == pytest.approx([0.0, slope], abs=1e-5)
    assert bool(held) == (slope == 0)


# ------------------------------------------------------------------------------ control of β

def test_beta_rises_above_the_target_falls_below_and_rests_on_it():
    assert next_beta(0.1, 2.0, 2.0, 2.0) == 0.1
    assert next_beta(0.1, 2.2, 2.2, 2.0) > 0.1 > next_beta(0.1, 1.8, 1.8, 2.0)
    assert next_beta(0.1, 2.0, 1.5, 2.0) > 0.1 > next_beta(0.1, 2.0, 2.5, 2.0), "no braking"
    assert next_beta(0.2, 2.2, 2.1, 2.0) == pytest.approx(2 * next_beta(0.1, 2.2, 2.1, 2.0))


@pytest.mark.parametrize("kl, last", [(1e9, 0), (-5, 1e9), (0, 0), (0, 1e9)])
def test_beta_changes_by_half_at_most(kl, last):
    assert 1 / 1.5 < next_beta(1.0, kl, last, 0.5) < 1.5


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0, 3.0])
def test_beta_settles_where_kl_follows_it_five_iterations_behind(target):
    beta, kl, last, seen = 0.1, 0.0, 0.0, []
    for _ in range(30):
        beta, last = next_beta(beta, kl, last, target), kl
        kl += (0.13 / beta - kl) / 5  # a policy whose optimum has KL 1 at β = 0.13
        seen.append(kl / target)
    assert all(abs(x - 1) < 0.2 for x in seen[20:]), f"still swings: {seen}"


# ------------------------------------------------------------------------------ the networks

def test_the_value_network_reads_no_future_and_all_of_the_past():
    model = ValueModel(tiny(0))
    assert not model(torch.tensor([[0, 1, 2]])).any(), "its head must start at 0"
    torch.nn.init.normal_(model.score.weight)
    idx = torch.tensor([[0, 1, 2, 0, 1, 3]])
    values = model(idx)
    assert values.shape == idx.shape and values[0, 0] == 0
    for t in range(1, idx.size(1)):
        other = idx.clone()
        other[0, t:] = (other[0, t:] + 1) % 4
        changed = (model(other) != values)[0]
        assert not changed[: t + 1].any(), f"a value before token {t} has read it"
        assert changed[t + 1 :].all(), f"a value after token {t} has not read it"


def test_values_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert ValueModel(tiny(0))(torch.tensor([[0, 1, 2]])).dtype == torch.float32


def test_in_the_warm_up_only_the_value_network_learns():
    ppo = trainer(warmup=2)
    before, reference = bits(ppo.policy), bits(ppo.reference)
    for step in range(2):
        values = bits(ppo.value)
        assert ppo.step(step, PROMPTS, 0)["kl"] == 0, "π is not π_ref, bit for bit"
        assert bits(ppo.policy) == before and bits(ppo.value) != values
    ppo.step(2, PROMPTS, 0)
    assert bits(ppo.policy) != before and bits(ppo.reference) == reference


def test_the_value_network_learns_what_is_to_be_expected():
    ppo = trainer(lambda prompts, completions: torch.tensor([float(len(p)) for p in prompts]),
                  steps=40, warmup=40, value_lr=1e-2)
    rows = [ppo.step(step, PROMPTS, 0) for step in range(40)]
    assert rows[-1]["explained_variance"] > 0.95 and rows[-1]["value_loss"] < 0.02
    assert abs(rows[0]["explained_variance"]) < 1e-6, "a constant explains nothing"


# ------------------------------------------------------------------------------ the step

def test_a_resumed_run_is_bit_for_bit_the_same():
    whole, first, second = (trainer(target=0.5) for _ in range(3))
    rows = [whole.step(step, PROMPTS, 7) for step in range(5)]
    again = [first.step(step, PROMPTS, 7) for step in range(3)]
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.load(torch.load(file, weights_only=True))
    torch.manual_seed(99)  # no draw may come from the global generator
    again += [second.step(step, PROMPTS, 7) for step in (3, 4)]
    assert again == rows
    assert bits(second.policy) == bits(whole.policy) and bits(second.value) == bits(whole.value)
    assert (second.samples, second.forwards) == (whole.samples, whole.forwards)
    assert second.last == whole.last and len({row["beta"] for row in rows}) > 2


def test_steps_and_seeds_differ():
    ppo = trainer()
    seen = [(ppo.step(0, PROMPTS, seed), ppo.last[1])[1] for seed in (0, 2**48 - 1)]
    ppo.step(1, PROMPTS, 0)
    assert seen[0] != seen[1] != ppo.last[1] != seen[0]


def test_beta_is_controlled_after_the_warm_up_and_only_towards_a_target():
    ppo, last = trainer(target=0.5, warmup=2), 0.0
    rows = [ppo.step(step, PROMPTS, 0) for step in range(6)]
    assert rows[0]["beta"] == rows[1]["beta"] == rows[2]["beta"] == ppo.config.beta
    for row, after in zip(rows[2:], rows[3:]):
        assert after["beta"] == next_beta(row["beta"], row["kl"], last, 0.5) != row["beta"]
        last = row["kl"]
    fixed = trainer(warmup=0)
    assert [fixed.step(step, PROMPTS, 0)["beta"] for step in range(3)] == [0.1] * 3


def test_the_first_gradient_of_the_value_network_is_the_mean_over_tokens():
    ppo = trainer(minibatches=1, epochs=1, lam=1.0)
    row = ppo.step(0, PROMPTS, 0)  # V = 0 and π = π_ref: every token's return is the score
    idx, prompt_lens, lengths = pad_rows(*ppo.last)
    at = dpo.completion_mask(prompt_lens, lengths, idx.size(1))[:, 1:]
    scores = (count_zeros(*ppo.last)[:, None] * at)[at]
    with torch.no_grad():
        hidden = ppo.reference.hidden(idx[:, :-1])[at]
    slopes = (scores[:, None] * hidden).mean(0).square().sum() + scores.mean().square()
    assert row["value_grad_norm"] == pytest.approx(float(slopes.sqrt()), rel=1e-4)
    assert row["value_loss"] == pytest.approx(float(scores.square().mean() / 2), rel=1e-4)


def test_few_rows_at_once_take_the_same_step():
    rows = [trainer(rows=n, warmup=0, epochs=1, minibatches=1).step(0, PROMPTS, 0)
            for n in (512, 5)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4, abs=1e-6)
    assert rows[0]["clip_fraction"] == rows[0]["approx_kl"] == 0, "a ratio does not start at 1"


def test_what_is_logged_is_of_the_samples():
    ppo = trainer()
    rows = [ppo.step(step, PROMPTS, 0) for step in range(2)]
    prompts, completions = ppo.last
    assert prompts == PROMPTS
    assert rows[1]["reward"] == pytest.approx(float(count_zeros(*ppo.last).mean()))
    assert rows[1]["length"] == sum(map(len, completions)) / len(completions)
    assert rows[1]["eos"] == sum(ids[-1] == EOS for ids in completions) / len(completions)
    n = len(PROMPTS)  # a warm-up iteration, then an ordinary one: 2 epochs
    assert ppo.samples == 2 * n and ppo.forwards == (4 + 2 * 1) * n + (4 + 2 * 2) * n


def test_a_score_that_is_not_finite_is_in_the_row_and_not_in_the_networks():
    ppo = trainer(lambda p, c: torch.full((len(p),), math.nan), warmup=0)
    before = bits(ppo.policy), bits(ppo.value)
    row = ppo.step(0, PROMPTS, 0)
    assert math.isnan(row["policy_loss"]) and math.isnan(row["value_loss"])
    assert (bits(ppo.policy), bits(ppo.value)) == before


def test_fp16s_scaler_skips_an_overflow_and_then_learns():
    ppo = trainer(context=lambda: torch.autocast("cpu", torch.float16), fp16=True, warmup=0,
                  epochs=1, minibatches=1)
    ppo.scaler.load_state_dict(ppo.scaler.state_dict() | {"scale": 2.0**100})
    before = bits(ppo.policy), bits(ppo.value)
    row = ppo.step(0, PROMPTS, 0)
    assert all(map(math.isfinite, row.values())) and row["grad_norm"] == 0
    assert (bits(ppo.policy), bits(ppo.value)) == before and ppo.scaler.get_scale() == 2.0**99
    ppo.scaler.load_state_dict(ppo.scaler.state_dict() | {"scale": 2.0**8})
    whole = trainer(warmup=0, epochs=1, minibatches=1).step(1, PROMPTS, 0)
    assert ppo.step(1, PROMPTS, 0)["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.1)
    assert bits(ppo.policy) != before[0]


# ------------------------------------------------------------------------------ Eq. 4

def enumerated(model: GPT, prompt, max_new: int, y=()) -> dict:
    """{y: log π(y|prompt)} of every completion, by recursion."""
    if len(y) == max_new or EOS in y:
        return {y: 0.0}
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *y]]))[0, -1].double().log_softmax(-1).tolist()
    return {ids: logp[v] + rest for v in range(len(logp))
            for ids, rest in enumerated(model, prompt, max_new, (*y, v)).items()}


def solve(seed: int, reference: GPT, prompts, max_new: int, beta: float, **config):
    """PPO on a random reward table: log π, log π_ref and log π_r, each (P, K), y enumerated."""
    ys = list(enumerated(reference, prompts[0], max_new))
    table = torch.randn(len(prompts), len(ys), generator=torch.Generator().manual_seed(seed))

    def reward(prompts_, completions):
        return torch.stack([table[prompts.index(p), ys.index(tuple(y))]
                            for p, y in zip(prompts_, completions)])

    policy, before = copy.deepcopy(reference), bits(reference)
    config = PPOConfig(max_new=max_new, lr=1e-2, value_lr=1e-2, beta=beta, **config)
    ppo = PPO(policy, reference, reward, EOS, config)
    batch = prompts * (256 * max_new // len(prompts))
    for step in range(config.steps):
        ppo.step(step, batch, seed)
    assert bits(reference) == before, "π_ref was changed"
    logps, ref_logps = (torch.tensor([list(enumerated(m, p, max_new).values()) for p in prompts])
                        for m in (policy, reference))
    return logps, ref_logps, dpo.optimal_policy(ref_logps, table, beta)


def close(logps, ref_logps, optimum):
    assert dpo.kl_divergence(optimum, ref_logps).max() > 0.1, "too easy: π_ref solves it"
    both = dpo.kl_divergence(optimum, logps).max(), dpo.kl_divergence(logps, optimum).max()
    assert max(both) < 1e-2, f"PPO is {both} nats from π_r"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_solves_the_bandit_whose_optimum_is_eq04(seed):
    close(*solve(seed, tiny(seed), [[0], [1, 2]], 1, beta=0.5, steps=50))


@pytest.mark.parametrize("seed", [0, 2])
def test_ppo_finds_eq04_over_every_completion_of_two_tokens(seed):
    reference = tiny(seed, sharpness=8.0)
    close(*solve(seed, reference, [[0], [1, 2]], 2, beta=1.0, steps=60))
