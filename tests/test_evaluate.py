"""Laws of evaluate.py: the KL is the enumerated KL, no policy lies above the optimum, and the table
shows the numbers of the files."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import folder

import evaluate as module
from data_imdb import encoding_of
from evaluate import (COLUMNS, correlation, distinct2, evaluate, held_out_measures,
                      jackknife_optimum, optimal_frontier, optimal_reward, pairwise_accuracy,
                      rank_correlation, read_samples, repetition, report, sequence_kl,
                      standard_error, table, write_samples)
from gpt import GPT, GPTConfig, pad_rows
from support.tokenizer_files import read_tiktoken

V, EOS, MAX_NEW = 4, 3, 3
PROMPTS = [[0], [0, 1], [2, 2, 0]]


def tiny(seed: int, sharpness: float = 40.0) -> GPT:
    """A GPT whose distributions are far from uniform and far from those of another seed."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=V, n_ctx=8, n_layer=1, n_head=2, n_embd=8))
    with torch.no_grad():
        model.wte.weight.mul_(sharpness)
        model.wpe.weight.mul_(sharpness)
    return model.eval()


@pytest.fixture(scope="module")
def pair() -> tuple[GPT, GPT]:
    return tiny(0), tiny(1)


def step_logps(model: GPT, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log π(. | ids), (V,) float64, by the plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1].double()
    if temperature == 0:
        return torch.full_like(logits, -math.inf).index_fill(0, logits.argmax(), 0.0)
    return (logits / temperature).log_softmax(-1)


def enumerated(policy, reference, prompt, temperature=1.0, before=()):
    """Every completion of the prompt with log π(y|x) and log π_ref(y|x), by recursion."""
    out, ids = [], [*prompt, *(token for token, _, _ in before)]
    logp, logq = step_logps(policy, ids, temperature), step_logps(reference, ids)
    for token in range(V):
        path = [*before, (token, float(logp[token]), float(logq[token]))]
        if token == EOS or len(path) == MAX_NEW:
            out.append(([t for t, _, _ in path], sum(p for _, p, _ in path),
                        sum(q for _, _, q in path)))
        elif logp[token] > -math.inf:
            out += enumerated(policy, reference, prompt, temperature, path)
    return [y for y in out if y[1] > -math.inf]


def scored(policy, reference, prompt, completions, temperature=1.0):
    return sequence_kl(policy, reference, *pad_rows([prompt] * len(completions), completions),
                       temperature=temperature)


def drawn(seed):
    """The argument `sample` of evaluate."""
    return lambda model, prompts, temperature: model.sample(prompts, MAX_NEW, EOS, seed,
                                                            temperature)


# ------------------------------------------------------------------------------ sequence KL

@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0, 0.0])
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_both_estimators_have_the_enumerated_kl_as_their_mean(pair, prompt, temperature):
    ys = enumerated(*pair, prompt, temperature)
    assert len(ys) == (1 if temperature == 0 else 1 + 3 + 9 + 27), "not every completion"
    p = torch.tensor([y[1] for y in ys], dtype=torch.float64).exp()
    assert abs(p.sum() - 1) < 1e-12
    exact = sum(math.exp(a) * (a - b) for _, a, b in ys)
    kl, kl_mc, ref_nll = scored(*pair, prompt, [y[0] for y in ys], temperature)
    assert exact > 0.1, "the two models are too similar for this test"
    assert abs(p @ kl - exact) < 1e-5, "the per-step KL is not unbiased"
    assert abs(p @ kl_mc - exact) < 1e-5, "the one-sample estimate is not unbiased"
    for (_, logp, logq), mc, nll in zip(ys, kl_mc.tolist(), ref_nll.tolist()):
        assert abs(mc - (logp - logq)) < 1e-5, "kl_mc is log π(y|x) - log π_ref(y|x)"
        assert abs(nll + logq) < 1e-5, "ref_nll is -log π_ref(y|x)"


def test_means_over_samples_are_within_four_standard_errors_of_the_enumerated_kl(pair):
    prompt = PROMPTS[1]
    exact = sum(math.exp(a) * (a - b) for _, a, b in enumerated(*pair, prompt))
    point = evaluate(*pair, [prompt] * 4000, None, drawn(0), EOS)
    for name in ("kl", "kl_mc"):
        z = (point[name] - exact) / point[name + "_se"]
        assert abs(z) < 4, f"{name} = {point[name]:.4f} is {z:.1f} standard errors off {exact:.4f}"
    assert point["kl_se"] < point["kl_mc_se"]


@pytest.mark.parametrize("seed", range(3))
def test_near_the_reference_the_per_step_kl_has_the_smaller_variance(seed):
    """With weights moved by ε, its standard deviation is of order ε², that of the one-sample
    estimate of order ε. Far from π_ref there is no such law."""
    ratios = []
    for epsilon in (0.3, 0.03):
        policy, reference, other = tiny(seed), tiny(seed), tiny(seed + 100)
        with torch.no_grad():
            for p, q in zip(policy.parameters(), other.parameters()):
                p.add_(epsilon * (q - p))
        ys = enumerated(policy, reference, [0])
        p = torch.tensor([y[1] for y in ys], dtype=torch.float64).exp()
        kl, kl_mc, _ = scored(policy, reference, [0], [y[0] for y in ys])
        var, var_mc = (float(p @ (x - p @ x) ** 2) for x in (kl, kl_mc))
        ratios.append(var / var_mc)
    assert ratios[0] < 1, f"{ratios[0]:.3f} of the one-sample estimate's variance"
    assert ratios[1] < 0.1 * ratios[0], f"ratios {ratios}: it should fall as ε²"


def test_the_one_sample_estimate_can_be_negative_and_the_per_step_kl_cannot(pair):
    kl, kl_mc, _ = scored(*pair, [0], [y[0] for y in enumerated(*pair, [0])])
    assert kl_mc.min() < -0.1, "log π - log π_ref is clamped"
    assert kl.min() >= 0


def test_the_kl_of_a_policy_to_itself_is_zero(pair):
    kl, kl_mc, _ = scored(pair[0], pair[0], [0], [y[0] for y in enumerated(*pair, [0])])
    assert torch.equal(kl, torch.zeros_like(kl)) and torch.equal(kl_mc, torch.zeros_like(kl))


def test_the_chain_rule_holds_so_the_prompt_is_not_counted(pair):
    """KL(y|x) = KL(y₁|x) + KL(y₂|x y₁), where y₁ has become a part of the second prompt."""
    x, y = [0, 1], [2, 1, 0, EOS]
    whole = scored(*pair, x, [y])
    for i in range(1, len(y)):
        parts = scored(*pair, x, [y[:i]]) + scored(*pair, x + y[:i], [y[i:]])
        torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    idx, prompt_lens, _ = pad_rows([x], [y])
    assert sequence_kl(*pair, idx, prompt_lens, prompt_lens).abs().max() == 0, \
        "an empty completion has no KL: the prompt was counted"


def test_the_padding_after_a_completion_changes_nothing(pair):
    short, long = [0, EOS], [1, 1, 2, 1]
    alone = scored(*pair, [0], [short])
    idx, prompt_lens, lengths = pad_rows([[0], [0]], [short, long])
    for fill in range(V):
        idx[0, lengths[0]:] = fill
        both = sequence_kl(*pair, idx, prompt_lens, lengths)
        torch.testing.assert_close(both[:, :1], alone, rtol=0, atol=1e-6)


def test_the_step_that_draws_eos_counts(pair):
    ended, cut_off = scored(*pair, [0], [[1, EOS], [1]]).T
    logp, logq = (step_logps(model, [0, 1]) for model in pair)
    exact = float((logp.exp() * (logp - logq)).sum())
    assert abs(ended[0] - cut_off[0] - exact) < 1e-5, "the EOS step's KL is missing"
    assert abs(ended[1] - cut_off[1] - float(logp[EOS] - logq[EOS])) < 1e-5


def test_computing_the_logits_in_blocks_changes_nothing(pair, monkeypatch):
    ys = [y[0] for y in enumerated(*pair, [0])]
    whole = scored(*pair, [0], ys)
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", 7 * 4 * V)  # seven tokens at a time
    torch.testing.assert_close(scored(*pair, [0], ys), whole, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------ one point

HAND = [[0, 1, EOS], [1, 1, 1, 1, 1], [2, EOS], [EOS]]  # tokens: 3, 5, 2, 1


class Judge:
    """r* of the four completions, with the toy's share of grammatical sentences."""

    def __call__(self, prompts, completions):
        return torch.tensor([0.1, 0.2, 0.6, 0.7])

    def grammatical(self, prompts, completions):
        return 0.25


def by_hand(pair):
    return evaluate(*pair, [[0]] * 4, Judge(), lambda *_: HAND, EOS)


def test_every_field_of_a_point_on_completions_written_by_hand(pair):
    point = by_hand(pair)
    assert point["completions"] == HAND and point["samples"] == 4 and point["temperature"] == 1.0
    assert point["eos"] == 3 / 4, "the share that ends with EOS"
    assert point["length"] == 11 / 4, "in tokens, EOS included"
    assert point["grammatical"] == 0.25
    assert abs(point["reward"] - 0.4) < 1e-6
    for name, values in dict(length=[3, 5, 2, 1], reward=[0.1, 0.2, 0.6, 0.7]).items():
        assert abs(point[name + "_se"] - statistics.stdev(values) / 2) < 1e-6, f"{name}_se"
    kl, kl_mc, _ = scored(*pair, [0], HAND)
    for name, values in dict(kl=kl, kl_mc=kl_mc).items():
        assert abs(point[name] - values.mean()) < 1e-6
        assert abs(point[name + "_se"] - statistics.stdev(values.tolist()) / 2) < 1e-6
    assert point["rewards"] == [0.1, 0.2, 0.6, 0.7] and len(point["kls"]) == 4
    assert all(abs(a - b) < 1e-4 for a, b in zip(point["kls"], kl.tolist())), "to four digits"
    json.dumps(point, allow_nan=False)  # a run writes it like this


def test_ref_ppl_is_exp_of_all_nll_over_all_tokens(pair):
    nll = sum(-float(step_logps(pair[1], [0] + y[:i])[y[i]]) for y in HAND for i in range(len(y)))
    assert abs(by_hand(pair)["ref_ppl"] / math.exp(nll / 11) - 1) < 1e-5
    uniform = tiny(0, sharpness=0)
    assert abs(by_hand((pair[0], uniform))["ref_ppl"] - V) < 1e-5, \
        "a uniform reference has perplexity V, for all lengths"


def test_without_a_reward_the_fields_of_the_reward_are_none(pair):
    point = evaluate(*pair, PROMPTS, None, drawn(0), EOS)
    assert point["reward"] is None and point["reward_se"] is None and point["grammatical"] is None
    assert "rewards" not in point and len(point["kls"]) == len(PROMPTS)


def test_the_batch_size_changes_nothing(pair):
    """A prompt's numbers do not depend on the other prompts of its batch."""
    many = PROMPTS * 3
    points = [evaluate(*pair, many, None, drawn(3), EOS, batch_size=n) for n in (1, 4, 512)]
    for point in points[1:]:
        assert point["completions"] == points[0]["completions"]
        assert abs(point["kl"] - points[0]["kl"]) < 1e-5
        assert abs(point["ref_ppl"] - points[0]["ref_ppl"]) < 1e-4


def test_the_reward_is_called_with_the_prompts_and_the_samples(pair):
    seen = []

    def reward(prompts, completions):
        seen.append((prompts, completions))
        return torch.zeros(len(prompts))

    a, b = (evaluate(*pair, PROMPTS * 20, reward, drawn(5), EOS) for _ in range(2))
    assert a == b, "the same samples give the same point"
    assert seen[0] == (PROMPTS * 20, a["completions"])


def test_the_kl_is_of_the_policy_at_the_temperature_it_is_sampled_at(pair):
    kls = {}
    for temperature in (0.0, 0.5, 1.0):
        ys = enumerated(*pair, [0, 1], temperature)
        kls[temperature] = sum(math.exp(a) * (a - b) for _, a, b in ys)
        point = evaluate(*pair, [[0, 1]] * 1000, None, drawn(0), EOS, temperature)
        assert point["temperature"] == temperature
        for name in ("kl", "kl_mc"):
            gap, se = abs(point[name] - kls[temperature]), point[name + "_se"]
            assert gap <= 4 * se + 1e-5, f"{name} at temperature {temperature} is {gap:.3f} off"
    assert min(abs(kls[0.5] - kls[1.0]), abs(kls[0.0] - kls[0.5])) > 0.05


def test_repetition_and_distinct2_on_lists_written_by_hand():
    assert repetition([[1, 2, 3, 4, 5]]) == 0, "varied text"
    assert repetition([[7] * 12]) == 1 - 1 / 10, "one trigram, ten times"
    assert repetition([[1, 2, 3, 1, 2, 3]]) == 1 - 3 / 4, "123 231 312 123"
    assert repetition([[1, 2], [7] * 12]) == 0.45, "a mean over completions; 0 if too short"
    assert repetition([[1, 2, 3], [1, 2, 3]]) == 0, "within a completion, not between them"
    assert distinct2([[1, 2, 3], [1, 2, 4]]) == 3 / 4, "12 23 12 24, of all completions together"
    assert distinct2([[1, 1, 1, 1]]) == 1 / 3
    assert distinct2([[1], [2]]) == 0, "no bigram"
    assert distinct2([[1, 2], [3, 4]]) == 1, "2 and 3 are in two completions: no bigram"


def test_standard_error_falls_as_one_over_root_n():
    x = torch.tensor([0.0, 1.0])
    assert abs(standard_error(x) - math.sqrt(0.5) / math.sqrt(2)) < 1e-7
    assert abs(standard_error(x.repeat(5000)) - 0.5 / 100) < 1e-5
    assert math.isnan(standard_error(x[:1])), "one sample has no spread"


# ------------------------------------------------------------------------------ the optimum

BETAS = [float(b) for b in torch.logspace(1.3, -2, 60)]


@pytest.fixture(scope="module")
def rewards() -> torch.Tensor:
    """3 prompts with 16 possible completions each, equally likely under the reference."""
    return torch.rand(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gibbs(rewards, beta):
    """Eq. 4 by hand for a uniform reference: (reward, KL), means over prompts."""
    points = []
    for row in rewards.tolist():
        z = sum(math.exp(r / beta) / len(row) for r in row)
        pi = [math.exp(r / beta) / len(row) / z for r in row]
        points.append((sum(p * r for p, r in zip(pi, row)),
                       sum(p * math.log(p * len(row)) for p in pi if p)))
    return [statistics.mean(column) for column in zip(*points)]


def test_the_curve_is_eq04_enumerated(rewards):
    for point in optimal_frontier(rewards, BETAS):
        reward, kl = gibbs(rewards, point["beta"])
        assert abs(point["reward"] - reward) < 1e-12 and abs(point["kl"] - kl) < 1e-12


def test_samples_of_a_reference_that_is_not_uniform_estimate_its_optimum():
    generator = torch.Generator().manual_seed(0)
    logq = torch.randn(12, generator=generator, dtype=torch.float64).log_softmax(-1)
    r = torch.rand(12, generator=generator, dtype=torch.float64)
    samples = r[torch.multinomial(logq.exp(), 200_000, True, generator=generator)]
    for point in optimal_frontier(samples[None], [5, 1, 0.3, 0.1]):
        best = (logq + r / point["beta"]).log_softmax(-1)
        assert abs(point["reward"] - best.exp() @ r) < 0.005
        assert abs(point["kl"] - best.exp() @ (best - logq)) < 0.01


def test_reward_and_kl_rise_as_beta_falls(rewards):
    curve = optimal_frontier(rewards, BETAS)
    for a, b in zip(curve, curve[1:]):
        assert b["reward"] > a["reward"] and b["kl"] > a["kl"] and b["ess"] < a["ess"]
    slopes = [(b["reward"] - a["reward"]) / (b["kl"] - a["kl"]) for a, b in zip(curve, curve[1:])]
    for slope, a, b in zip(slopes, curve, curve[1:]):
        assert b["beta"] < slope < a["beta"], "β is the slope of the curve"


def test_no_policy_lies_above_the_curve(rewards):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2000, *rewards.shape, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-2, 1, 2000, dtype=torch.float64)[:, None, None]
    tilt = 10 * torch.rand(2000, 1, 1, generator=generator, dtype=torch.float64)
    logp = (tilt * rewards + scale * noise).log_softmax(-1)
    reward = (logp.exp() * rewards).sum(-1).mean(-1)
    kl = (logp.exp() * (logp + math.log(16))).sum(-1).mean(-1)
    curve = optimal_frontier(rewards, BETAS)
    for point in curve:
        bound = point["reward"] - point["beta"] * point["kl"]
        assert (reward - point["beta"] * kl).max() <= bound + 1e-12, f"Eq. 3 at {point['beta']}"
    best = [optimal_reward(curve, float(x)) for x in kl]
    compared = [(float(r), b) for r, b in zip(reward, best) if b is not None]
    assert len(compared) > 1000, "too few of the policies are within the curve's range"
    above = max(r - b for r, b in compared)
    assert -1e-3 < above < 1e-3, f"{above} above (interpolating 60 β errs by under 1e-3)"


def test_effective_samples_and_the_limits_of_large_and_small_beta(rewards):
    limit = optimal_frontier(rewards, [1e9, 1e-4])
    assert abs(limit[0]["ess"] - 16) < 1e-6 and abs(limit[0]["kl"]) < 1e-9, "β = ∞ is π_ref"
    assert abs(limit[0]["reward"] - rewards.mean()) < 1e-6
    assert abs(limit[1]["ess"] - 1) < 1e-6, "β = 0: one completion has all the weight"
    assert abs(limit[1]["kl"] - math.log(16)) < 1e-6, "the KL cannot exceed log K"
    assert abs(limit[1]["reward"] - rewards.amax(1).mean()) < 1e-6
    tied = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    point, = optimal_frontier(tied, [1e-4])
    assert abs(point["ess"] - 3) < 1e-6, "three equal best share the weight"
    assert abs(point["kl"] - math.log(2)) < 1e-6
    flat, = optimal_frontier(torch.full((2, 8), 0.5), [0.01])
    assert abs(flat["kl"]) < 1e-9 and abs(flat["ess"] - 8) < 1e-6, "equal rewards: π_r is π_ref"


@pytest.mark.parametrize("beta", [1e-3, 1e-8, 1e-100, 1e-300])
def test_a_tiny_beta_neither_overflows_nor_gives_a_kl_above_log_k(rewards, beta):
    point, = optimal_frontier(rewards.float(), [beta])
    assert len(point["rewards"]) == len(point["kls"]) == len(rewards)
    assert all(math.isfinite(x) for v in point.values()
               for x in (v if isinstance(v, list) else [v])), point
    assert point["kl"] <= math.log(16) + 1e-9 and point["reward"] <= 1 and point["ess"] >= 1 - 1e-9
    json.dumps(point, allow_nan=False)


def test_the_jackknife_removes_most_of_the_bias_of_few_samples():
    """Rewards are 0 or 1 with equal probability, 16 samples per prompt. Eq. 4's policy is known."""
    best = 1 / (1 + math.exp(-1))  # at β = 1
    kl = math.log(2) + best * math.log(best) + (1 - best) * math.log(1 - best)
    coins = torch.randint(2, (20_000, 16), generator=torch.Generator().manual_seed(0))
    (plain,), (point,) = (f(coins, [1.0]) for f in (optimal_frontier, jackknife_optimum))
    for key, exact in (("reward", best), ("kl", kl)):
        se = point[key + "_se"]
        off, before = abs(point[key] - exact) / se, abs(plain[key] - exact) / se
        assert before > 5, f"{key} is only {before:.1f} standard errors off without it"
        assert off < before / 2, f"{key} is {before:.1f} se off without it, {off:.1f} with it"


def test_the_jackknife_is_twice_the_whole_minus_the_mean_of_two_disjoint_halves(rewards):
    """Samples 0, 2, 4 ... are one half, samples 1, 3, 5 ... the other."""
    for point in jackknife_optimum(rewards, [0.3, 0.1]):
        for i, key in enumerate(("reward", "kl")):
            each = [2 * gibbs(row[None], point["beta"])[i] - statistics.mean(
                gibbs(row[None, half::2], point["beta"])[i] for half in (0, 1)) for row in rewards]
            np.testing.assert_allclose(point[key + "s"], each, atol=3e-4)  # four digits
            assert point[key] == pytest.approx(statistics.mean(each), abs=2e-4)
            se = statistics.stdev(each) / math.sqrt(len(each))
            assert point[key + "_se"] == pytest.approx(se, abs=2e-4)


def test_optimal_reward_interpolates_only_between_points_with_ess_of_2_or_more():
    curve = [dict(kl=2.0, reward=0.9, ess=2), dict(kl=0.0, reward=0.5, ess=64),
             dict(kl=1.0, reward=0.8, ess=20), dict(kl=3.0, reward=0.95, ess=1.9)]
    for kl, reward in ((0.0, 0.5), (0.5, 0.65), (1.0, 0.8), (1.5, 0.85), (2.0, 0.9)):
        assert abs(optimal_reward(curve, kl) - reward) < 1e-12, f"at {kl}"
    assert optimal_reward(curve, 2.5) is None, "past the last point with ess >= 2"
    assert optimal_reward(curve, -0.1) is None and optimal_reward(curve, math.nan) is None
    assert optimal_reward([], 1.0) is None
    assert optimal_reward([curve[1]] * 2, 0.0) == 0.5, "equal points"


# ------------------------------------------------------------------------------ agreement with r*


def test_pairwise_accuracy_counts_a_tie_as_half():
    a, b = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 1.0, 2.0])
    assert pairwise_accuracy(a, b).tolist() == [0, 1, 0.5]
    assert pairwise_accuracy(a.numpy(), b.numpy()).tolist() == [0, 1, 0.5], "NumPy arrays too"


def test_held_out_accuracy_is_the_share_of_pairs_in_order():
    rewards = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.2, 0.7]])  # 3 pairs and 2: a tie is no pair
    ref_logps = torch.tensor([-3.0, -4.0, -5.0, -6.0, -7.0, -8.0])
    right = held_out_measures(ref_logps + rewards.flatten(), ref_logps, rewards)
    assert right["accuracy"] == 1
    assert right["logp_chosen"] == pytest.approx((2 * -2.1 - 4.5 + 2 * -7.3) / 5)
    assert right["logp_rejected"] == pytest.approx((-4.5 + 2 * -3.9 - 5.8 - 6.8) / 5)
    for h, accuracy in ((-rewards.flatten(), 0), (0, 0.5),  # at π_ref every r̂ is 0
                        (torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 0.5]), 2 / 5)):
        got = held_out_measures(ref_logps + h, ref_logps, rewards)["accuracy"]
        assert got == pytest.approx(accuracy)


def test_rank_correlation_is_spearmans_within_a_prompt():
    r = torch.tensor([[1.0, 2, 3, 4], [0.9, 0.1, 0.5, 0.7]])
    other = r.exp() * 7 + torch.tensor([[100.0], [-5.0]])  # monotone plus f(x): the same ranks
    assert rank_correlation(other, r) == pytest.approx(1, abs=1e-6)
    assert rank_correlation(-r, r) == pytest.approx(-1, abs=1e-6)
    assert rank_correlation(torch.tensor([[2.0, 1, 3, 4]]), r[:1]) == pytest.approx(0.8, abs=1e-6)
    tied = rank_correlation(torch.tensor([[1.0, 1, 3, 4]]), r[:1])
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5), abs=1e-6), "tied ranks are averaged"


def test_near_the_reference_the_correlation_is_the_share_of_the_optimal_gain():
    torch.manual_seed(0)
    r, noise = torch.rand(50, 30).double(), torch.randn(50, 30).double()
    h = 1e-3 * (r + 0.2 * noise)  # log π/π_ref + f(x), π_ref uniform
    want = correlation(h + torch.randn(50, 1), r)
    logp = h.log_softmax(-1)
    kl = (logp.exp() * (logp + math.log(30))).sum(-1).mean()
    gain = (logp.exp() * r).sum(-1).mean() - r.mean()
    best = optimal_frontier(r, [float((r.var(-1, correction=0).mean() / (2 * kl)).sqrt())])[0]
    assert best["kl"] == pytest.approx(float(kl), rel=1e-2), "Eq. 4's policy at the same KL"
    assert 0.5 < want < 0.9
    assert float(gain) / (best["reward"] - float(r.mean())) == pytest.approx(want, rel=1e-2)


# ------------------------------------------------------------------------------ what a run prints


def read(path):
    return json.loads(path.read_text())


def test_the_table_shows_the_numbers_of_the_files(chain):
    result = read(folder(chain.out, "dpo") / "result.json")
    reference_eval = read(folder(chain.out, "groups") / "reference.json")
    lines = chain.text.splitlines()
    at, = (i for i, line in enumerate(lines) if "reward r*  " in line)
    title = read(folder(chain.out, "dpo") / "config.json")["about"]["title"]
    assert title.startswith("DPO, β 0.5; reviews 300"), "which run is it?"
    printed = lines[next(i for i, line in enumerate(lines) if line.startswith("π_θ: ")) : at]
    assert " ".join(printed) == f"π_θ: {title}; 8 held-out prompts, ± one standard error"
    assert max(map(len, printed)) <= 100 and len(printed) > 1
    head, before, after, best = lines[at : at + 4]
    for title, (key, digits, _) in COLUMNS.items():
        assert title in head and f"{result[key]:.{digits}f}" in after.split(), title
        value = reference_eval["point"].get(key)
        assert value is None or f"{value:.{digits}f}" in before.split(), title
    assert len(before.split()) == len(after.split()) - 2, "π_ref has no KL ± and no accuracy"
    assert [before[:5], after[:3], best[:18]] == ["π_ref", "π_θ", "optimum at that KL"]
    reward = optimal_reward(reference_eval["optimum"], result["kl"])
    assert best.split()[4:] == ["-" if reward is None else f"{reward:.3f}", f"{result['kl']:.3f}"]
    for name in ("curves.png", "samples.txt"):
        assert str(folder(chain.out, "dpo") / name) in chain.text, f"{name}'s path is not printed"
    samples = (folder(chain.out, "dpo") / "samples.txt").read_text().split("\n\n")
    assert "\n\n".join(samples[:4]) in chain.text and samples[4] not in chain.text


def test_a_table_fits_100_columns_and_explains_itself():
    wide = {key: 0.5 for key, *_ in COLUMNS.values()} | dict(
        kl=754.3991, kl_se=12.3456, reward_se=0.01, length=64.0, length_se=0.44)
    text = table({"π_θ": wide, "optimum at that KL": dict(reward=None, kl=754.3991)})
    assert all(len(line) <= 100 for line in text.splitlines()), text
    for title, (_, _, meaning) in COLUMNS.items():
        assert f"{title}: {meaning}" in text.replace("\n", " ")
    best = text.splitlines()[2]
    assert best.split() == ["optimum", "at", "that", "KL", "-", "754.399"], "nothing else is known"
    text = table({"π_θ": wide | dict(grammatical=None, reward=None)})
    assert "grammatical" not in text and "r*" not in text, "no measure, no column"
    assert "-0.000" not in table({"π_θ": dict(kl=-0.0004)})


def test_a_report_says_where_to_look_and_what_to_run_next(chain, job, capsys):
    def said(stage, *flags):
        job.command = [*flags, "--out", "my out", "--beta", "0.5"]
        report(job, stage)
        return capsys.readouterr().out.splitlines()

    job.reference_eval["point"] |= dict(reward=0.4, reward_se=0.001)
    after = read(folder(chain.out, "dpo") / "result.json")
    kls, reward = (0, 2 * after["kl"]), 2 * after["reward"] - 0.4  # twice the gain at its KL
    job.reference_eval["optimum"] = [dict(kl=kl, reward=reward, ess=4) for kl in kls]
    lines = said("dpo")
    assert "Look first at reward: π_θ has 50% of the gain that is possible at its KL." in lines
    assert any(line.startswith('Then compare the column "grammatical" with') for line in lines)
    nexts = [line.split("  #")[0] for line in lines if line.startswith("next:")]
    assert nexts == [f"next:    python train.py --stage {name} --out 'my out' --beta 0.5"
                     for name in ("inspect", "degenerate")], "the command's other flags stay"
    job.folder = {name: job.folder(name) for name in ("dpo", "groups")}.get
    job.cfg = replace(job.cfg, labels="soft")
    assert not any("degenerate" in line for line in said("dpo")), "it takes hard labels alone"
    job.reference_eval["point"]["reward_se"] = 1.0
    assert not any("of the gain" in line for line in said("dpo")), "a share of noise"
    for point in job.reference_eval["optimum"]:
        point["kl"] /= 4
    lines = said("dpo", "--stage", "inspect")
    assert not any(line.startswith("next:") for line in lines), "dpo is made for another stage"
    assert f"Look first at KL: above {after['kl'] / 2:.2f} the optimum cannot be estimated" in \
        "\n".join(lines)
    job.reference_eval["optimum"] = []  # a preference file's
    assert not any(line.startswith("optimum") for line in said("dpo"))


def test_samples_txt_shows_both_completions_of_each_prompt(chain, tmp_path):
    """By π_ref and by the policy. "…" follows a completion that does not end with EOS. A line break
    is shown as ⏎, so that each prompt has three lines."""
    enc = encoding_of(read_tiktoken(folder(chain.out, "dpo") / "bpe.tiktoken"))
    reference_eval = read(folder(chain.out, "groups") / "reference.json")
    reference_eval["prompts"][1] = [enc.eot_token, *enc.encode_ordinary("User:\n\nHi\r\n" * 20)]
    ids = enc.encode_ordinary(" was\ndull.")
    job = SimpleNamespace(data=SimpleNamespace(enc=enc, eot=enc.eot_token),
                          reference_eval=reference_eval)
    after = dict(completions=[[*ids, enc.eot_token], ids] * 4, rewards=[0.25, 0.875] * 4)
    run = SimpleNamespace(path=lambda name: Path(tmp_path / name))
    write_samples(job, run, after, n=6)
    blocks = read_samples(tmp_path / "samples.txt")
    assert len(blocks) == 6
    for i, (prompt, before, last) in enumerate(blocks):
        assert prompt == "prompt:  " + ("User:⏎⏎Hi⏎" * 20)[:-1] if i == 1 else \
            "prompt:  " + enc.decode(reference_eval["prompts"][i][1:])
        assert before.startswith(f"before:  r* {reference_eval['point']['rewards'][i]:.2f} |")
        assert last == "after:   r* " + ("0.88 | was⏎dull. …" if i % 2 else "0.25 | was⏎dull.")
    del after["rewards"]
    write_samples(job, run, after)
    assert "after:   r* - |" in (tmp_path / "samples.txt").read_text(), "no r* of a preference file"
