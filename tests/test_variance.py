"""Laws of experiments/variance.py: the mean policy gradient, its variance, the stage."""

import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, command, folder, refused
from test_plot_frontier import assert_nothing_is_cut_off, labels, saved_by

import dpo
import experiments.variance
from experiments import theory
from experiments.variance import (baselines, draw, fitted_beta, inner_products, score_gradients,
                                  total_variance)
from gpt import GPT, GPTConfig, pad_rows
from train import sequence_logps

NAMES = ["no baseline", "one π_ref sample", "mean under π_ref", "soft value", "leave-one-out mean"]
BETA = 0.3


def test_eq10_no_baseline_changes_the_mean_gradient_of_a_gpt():
    """Over all completions of at most two tokens. The mean is the gradient of Eq. 3."""
    torch.manual_seed(0)
    policy, reference = (GPT(GPTConfig(4, 4, 1, 2, 8)).double() for _ in range(2))
    for p in policy.parameters():  # far from π_ref
        p.data += 0.3 * torch.randn_like(p)
    completions = [[0], *([a, b] for a, b in itertools.product((1, 2, 3), range(4)))]  # 0 ends
    padded = pad_rows([[0]] * len(completions), completions)
    logps, ref_logps = (sequence_logps(model, *padded) for model in (policy, reference))
    assert float(logps.detach().exp().sum()) == pytest.approx(1), "these are all completions"
    r = torch.rand(len(completions), dtype=torch.float64)
    objective = dpo.objective(logps, ref_logps.detach(), r, BETA)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(
        objective, list(policy.parameters()), retain_graph=True)])

    job = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    grads = score_gradients(job, policy, [0], completions)
    flat = torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])  # (y, numbers)
    torch.testing.assert_close(inner_products(grads), flat @ flat.T)
    logps, ref_logps = logps.detach(), ref_logps.detach()
    signal = theory.soft_advantage(logps, ref_logps, r, BETA, 0.0)
    kinds = baselines(signal[None], torch.rand(1, 5, dtype=torch.float64), BETA)
    assert [*kinds] == NAMES
    for name in NAMES[:-1]:  # the last one depends on other samples
        advantage = (signal - kinds[name][0]).mean(0)
        mean = (logps.exp() * advantage) @ flat
        torch.testing.assert_close(mean, wanted, rtol=1e-6, atol=1e-9, msg=name)
    assert float(wanted.norm()) > 1e-3, "with a mean of 0 the test is empty"


def test_the_leave_one_out_mean_of_a_sample_is_the_mean_of_the_others():
    signal = torch.tensor([[1.0, 2.0, 6.0]])
    found = baselines(signal, torch.rand(1, 4), BETA)["leave-one-out mean"]
    torch.testing.assert_close(found, torch.tensor([[[4.0, 3.5, 1.5]]]))


def test_eq10_estimated_variances_equal_those_of_the_enumerated_world():
    """Means over many draws of K completions, against theory.policy_gradient's enumeration."""
    world, K, draws = dpo.World(), 4, 40_000
    pi = world.randn(3, 16).log_softmax(-1)
    reference = world.randn(3, 6)  # fixed rewards of R completions of π_ref
    y = torch.multinomial(pi.exp(), K * draws, replacement=True,
                          generator=world.generator).view(3, draws, K)
    signals = theory.soft_advantage(pi, world.ref, world.r, BETA, 0.0)  # (P, 16)
    score = F.one_hot(y, 16) - pi.exp()[:, None, None]  # (P, draws, K, 16)
    products = (score @ score.mT).flatten(0, 1)
    signal = signals[:, None].expand(-1, draws, -1).gather(2, y).flatten(0, 1)  # (P draws, K)
    found = {name: total_variance(signal, b, products).view(3, draws) for name, b in
             baselines(signal, reference.repeat_interleave(draws, 0), BETA).items()}

    uniform = torch.full_like(reference, -torch.tensor(6.0).log())
    soft = BETA * dpo.log_partition(uniform, reference, BETA)[:, None]
    mean = (pi.exp() * signals).sum(-1, keepdim=True)
    values = dict(zip(NAMES, (0 * soft, reference, reference.mean(1, keepdim=True), soft, mean)))
    for name, value in values.items():
        of_mean, wanted = theory.policy_gradient(world, BETA, pi, value,
                                                 torch.full_like(value, 1 / value.size(1)))
        if name == "leave-one-out mean":  # it has the variance of a mean of K - 1 signals
            spread = (pi.exp() * (signals - mean) ** 2).sum(-1) / (K - 1)
            wanted = wanted + spread * (1 - (2 * pi).exp().sum(-1))  # E|∇log π|²
            wanted = wanted - (of_mean**2).sum(-1) / (K - 1) ** 2
        se = found[name].std(1) / draws**0.5
        assert ((found[name].mean(1) - wanted).abs() < 5 * se).all(), name
        assert (se < 0.02 * wanted).all(), "too few draws"


def test_eq04_at_an_optimum_the_fitted_beta_is_its_beta():
    world = dpo.World()
    for beta in (0.1, 2.0):
        log_ratios = dpo.optimal_policy(world.ref, world.r, beta) - world.ref
        assert fitted_beta(world.r, log_ratios) == pytest.approx(beta), "Z(x) cancels"


def test_the_stage_measures_both_policies_and_prints_a_table(chain, copied, monkeypatch):
    # after six steps the policy is not near an optimum
    monkeypatch.setattr(experiments.variance, "fitted_beta", lambda *_: BETA)
    out = copied("sft", "groups", "dpo")
    result = command("--stage", "variance", *TINY, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    run = folder(out, "variance")
    table = json.loads((run / "variance.json").read_text())
    assert table["beta"] == BETA and table["prompts"] == 8
    assert [*table["policies"]] == ["π_ref", "DPO"]
    assert table["policies"]["π_ref"]["kl"] == 0 != table["policies"]["DPO"]["kl"]
    for name, policy in table["policies"].items():
        assert [*policy["ratios"]] == NAMES and policy["ratios"]["no baseline"] == [1, 0]
        one, mean = (policy["ratios"][b][0] for b in NAMES[1:3])
        assert one > mean, "one sample varies more than a mean"
        for b, (ratio, se) in policy["ratios"].items():
            assert ratio > 0 and se >= 0
            line, = [x for x in result.out.splitlines() if x.startswith(b)]
            assert f"{ratio:.3f} ±{se:.3f}" in line
    assert max(map(len, result.out[result.out.index("variance of the"):].splitlines()[:9])) <= 100
    assert (run / "variance.png").exists()


@pytest.mark.parametrize("flags, words", [
    (["--groups", "my.jsonl"], ["variance needs r*", "leave --groups out"]),
    (["--dpo-lr", "0"], ["r* does not rise", "--dpo-steps", "--dpo-lr"])])
def test_variance_without_r_star_or_a_trained_policy_is_refused(chain, copied, flags, words):
    out = copied("sft", "groups")
    refused(command("--stage", "variance", *TINY, *flags, "--out", out, "--data", chain.data),
            *words)


def test_the_figure_has_a_bar_per_baseline_and_policy_and_nothing_is_cut_off(tmp_path):
    policies = {name: dict(kl=kl, reward=0.5 + kl / 10, ratios={
        b: (1 / (1 + i + 10 * kl), 0.02) for i, b in enumerate(NAMES)})
        for name, kl in (("π_ref", 0.0), ("DPO", 2.9))}
    table = dict(beta=0.028, prompts=64, samples=16, policies=policies)
    figure = saved_by(lambda: draw(table, tmp_path / "variance.png"))
    ax, = figure.axes
    assert [t.get_text() for t in ax.get_xticklabels()] == NAMES
    assert ["at π_ref" in x or "at the DPO policy" in x for x in labels(figure)] == [True, True]
    heights = [p.get_height() for p in ax.patches]
    assert heights == [ratio for p in policies.values() for ratio, _ in p["ratios"].values()]
    assert "relative to no baseline" in ax.get_ylabel() and ax.get_xlabel()
    assert_nothing_is_cut_off(figure)
