"""frontier.py: the sweep as a stage. Two steps a run: what is asked is bookkeeping, not quality."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from conftest import TINY, command, folder, in_child, refused

import frontier
import pipeline
import points
from evaluate import optimal_frontier, unbiased
from frontier import candidates, finals, methods_of, rate_table
from methods import best_of_kl
from pipeline import STAGES
from stages import Context
from support.runs import UserError
from support.settings import IMDB, TOY, parse
from train import STOP, Diverged, Interrupted

FEW = [*TINY, "--sweep-steps", "2", "--ppo-steps", "2", "--best-of", "16", "--jobs", "1",
       "--rm-epochs", "1", "--points", "2"]


@pytest.fixture(scope="module")
def swept(chain, tmp_path_factory):
    """.out of a whole sweep with every extra, two points a run."""
    out = tmp_path_factory.mktemp("frontier") / "out"
    for stage in ("sft", "groups"):
        shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
    result = command("--stage", "frontier", *FEW, "--temperatures", "--out", out, "--data",
                     chain.data, figures=True)
    assert result.code == 0, result.err
    return out, result.out


@pytest.fixture
def ctx(chain, swept):
    _, name, _, s = parse([*FEW, "--out", str(swept[0]), "--data", str(chain.data)], STAGES, False)
    return Context(name, s, [])


@pytest.fixture
def lines(swept):
    return points.read_points(folder(swept[0], "frontier") / "frontier.jsonl")


def test_figure_2_is_whole(lines):
    found = {(p["method"], p["setting"]) for p in lines}
    for method, m in methods_of(TOY).items():
        assert {(method, setting) for setting in m.settings} <= found
    assert {("sft", ""), ("best-of-n", "N=16"), ("best-of-n-learned", "N=4")} <= found
    betas = {p["setting"] for p in lines if p["method"] == "dpo"}
    assert {"beta=0.05", "beta=0.1", "beta=1", "beta=5"} < betas, "Section 6.1"
    seeds = {p["seed"] for p in lines if p["method"] == "preferred-ft"}
    assert seeds == {0, 1, 2}, "Preferred-FT has no setting but its seed"


def test_every_point_has_every_key_and_the_same_prompts(lines):
    for p in lines:
        assert tuple(p) == tuple(points.KEYS)
        assert len(p["rewards"]) == len(p["kls"]) == 8
        assert p["method"] == "optimum" or 0 <= p["win"] <= 1
    sft = next(p for p in lines if p["method"] == "sft" and p["temperature"] == 1)
    assert sft["kl"] == 0 and sft["win"] == 0.5 and sft["step"] == 0, "π_ref ties with itself"
    for p in lines:
        if p["method"] == "best-of-n":
            assert p["kl"] == pytest.approx(best_of_kl(int(p["setting"][2:])))
        if p["method"] == "dpo" and p["temperature"] == 1:
            beta = float(p["setting"][5:])
            assert p["reward_learned"] == pytest.approx(beta * p["kl_mc"]), "r̂ of its own samples"


def test_points_come_at_regular_steps_and_their_cost_only_grows(lines):
    runs = {}
    for p in lines:
        if p["method"] in methods_of(TOY) and p["temperature"] == 1:
            runs.setdefault((p["method"], p["setting"], p["seed"]), []).append(p)
    for name, run in runs.items():
        assert [p["step"] for p in run] == [1, 2], name
        assert run[0]["forwards"] < run[1]["forwards"] and run[0]["seconds"] <= run[1]["seconds"]


def test_a_rate_is_the_best_of_four_on_validation_prompts(ctx, swept):
    table = rate_table(ctx)
    assert table == json.loads((folder(swept[0], "frontier") / "rates.json").read_text())
    for method in methods_of(ctx.s):
        rows = [row for row in table if row["method"] == method]
        assert len({row["rate"] for row in rows}) == 4
        best, = (row for row in rows if row["chosen"])
        assert best["share"] == max(row["share"] for row in rows)
    before = json.loads((ctx.folder("groups") / "reference.json").read_text())
    assert not set(map(tuple, before["valid"])) & set(map(tuple, before["prompts"]))


def test_a_candidate_at_the_chosen_rate_is_a_run_of_the_figure():
    s, rates = TOY, {name: float(f"{getattr(TOY, m.rate) * m.multiples[1]:.3g}")
                     for name, m in methods_of(TOY).items()}
    both = [p for p in finals(s, rates) if p in candidates(s)]
    assert len(both) == len(methods_of(s)), "one a method, which is not run twice"


def test_beyond_the_setting_that_it_was_chosen_at_a_larger_beta_takes_a_smaller_rate():
    s = replace(TOY, dial=True, rankings=True)
    rates = {name: getattr(s, m.rate) for name, m in methods_of(s).items()}
    for p in finals(s, rates):
        m = methods_of(s)[p.method]
        assert p.rate == getattr(p.settings, m.rate)
        beta, central = (x.get("beta", 1) for x in (m.settings[p.setting], m.settings[m.central]))
        want = rates[p.method] * min(1, math.sqrt(central / beta))
        assert p.rate == pytest.approx(want, rel=5e-3), (p.method, p.setting)
    assert len({p.rate for p in finals(s, rates) if p.method == "dpo"}) == 4, "2, 3, 4 and 5"
    assert {p.rate for p in finals(IMDB, dict(dpo=1e-5))} == {1e-5}, "elsewhere it was not measured"


def test_the_optimum_of_few_samples_lies_on_that_of_many():
    """β is the curve's slope, so r - β KL off the truth's is the distance from the curve."""
    torch.manual_seed(0)
    r = torch.rand(400, 1024).square()
    for beta in (0.3, 0.15, 0.1, 0.05):
        few, plain, true = (f(x, [beta])[0] for f, x in (
            (unbiased, r[:, :64]), (optimal_frontier, r[:, :64]), (optimal_frontier, r)))
        off, before = (abs(p["reward"] - true["reward"] - beta * (p["kl"] - true["kl"]))
                       for p in (few, plain))
        assert off < before / 2, f"β {beta}: {off:.4f} with the jackknife, {before:.4f} without"
        assert few["kl"] == pytest.approx(sum(few["kls"]) / 400, abs=1e-4)


def test_temperatures_are_those_of_one_finished_policy_a_method(lines):
    for method in ("dpo", "ppo", "preferred-ft", "best-of-n-learned", "sft"):
        cold = [p for p in lines if p["method"] == method and p["temperature"] != 1]
        assert sorted(p["temperature"] for p in cold) == [0, 0.25, 0.5, 0.75]
        assert len({(p["setting"], p["seed"], p["step"]) for p in cold}) == 1
        key = "setting", "seed", "step"
        assert any(all(p[k] == cold[0][k] for k in key) for p in lines
                   if p["method"] == method and p["temperature"] == 1)


def test_a_finished_run_is_never_run_again(chain, swept, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(swept[0], out, copy_function=shutil.copy2)
    shutil.rmtree(folder(out, "frontier"))
    monkeypatch.setattr(pipeline, "make_one", lambda *a: pytest.fail(f"run again: {a[2]}"))
    result = command("--stage", "frontier", *FEW, "--temperatures", "--out", out, "--data",
                     chain.data)
    assert result.code == 0, result.err
    again, before = (points.read_points(folder(root, "frontier") / "frontier.jsonl")
                     for root in (out, swept[0]))
    assert [p for p in again if p["temperature"] == 1] == \
        [p for p in before if p["temperature"] == 1], "the same points from the same files"


# ------------------------------------------------------------------------------ many at once


def test_a_ppo_run_that_was_there_before_changes_no_plan(ctx, monkeypatch):
    """r_φ's PPO is planned when all of its candidates are there, not one."""
    asked, table = [], rate_table(ctx)
    monkeypatch.setattr(frontier, "rate_table", lambda ctx: [
        row | dict(chosen=row["chosen"] if len(asked) > 1 else row["rate"] == 0.0005)
        if row["method"] == "ppo" else row for row in table])
    frontier.sweep(ctx, lambda runs, **_: asked.append(runs) or {})
    wave = [{(stage, s.ppo_target, s.ppo_lr) for stage, s in runs if stage == "ppo"}
            for runs in asked]
    rate, = (row["rate"] for row in table if row["method"] == "ppo" and row["chosen"])
    assert not wave[0] and len(wave[1]) == 4 and {target for _, target, _ in wave[1]} == {2.0}
    assert wave[2] == {("ppo", target, rate) for target in (0.5, 1.0, 3.0)}


@pytest.mark.parametrize("flags", ["--loss plackett-luce", "--labels soft", "--weight constant"])
def test_the_series_are_what_they_are_called_whatever_the_flags(flags):
    _, _, _, s = parse(["--rankings", "--dial", *flags.split()], STAGES, False)
    for p in finals(s, {name: 1e-3 for name in methods_of(s)}):
        wanted = {"dpo": ("pairwise", "hard"), "plackett-luce": ("plackett-luce", "hard"),
                  "dpo-soft": ("pairwise", "soft"), "dpo-sampled": ("pairwise", "sampled")}
        if p.stage == "dpo":
            assert (p.settings.loss, p.settings.labels) == wanted[p.method]
            assert p.settings.weight == "sigmoid"


@pytest.fixture
def two(chain, copied, monkeypatch):
    """A context with groups, and a sweep of two settings of one method."""
    out = copied("sft", "groups")
    one = methods_of(TOY)["unlikelihood"]._replace(multiples=(0.5, 1.0), settings={
        f"alpha={a}": dict(loss="unlikelihood", alpha=a) for a in (0.5, 1.0)})
    monkeypatch.setattr(frontier, "methods_of", lambda s: {"unlikelihood": one})
    _, name, _, s = parse([*FEW, "--out", str(out), "--data", str(chain.data)], STAGES, False)
    return Context(name, s, [])


def test_runs_in_parallel_are_the_runs_one_after_the_other(two, chain):
    plans = candidates(two.s)
    jobs, heard = [(p.stage, p.settings) for p in plans], []
    pipeline.build(two, "groups", "groups")
    hashes = pipeline.make_all(two, jobs, 2, lambda *a: heard.append(a))
    assert len(hashes) == 2 and {heard_of[2] for heard_of in heard} == {None}
    folders = [two.beside(s).folder(stage) for stage, s in jobs]
    kept = [(f / "model.pt").read_bytes() for f in folders]
    for f in folders:
        shutil.rmtree(f)
    assert pipeline.make_all(two, jobs, 1, lambda *a: None) == hashes
    assert [(f / "model.pt").read_bytes() for f in folders] == kept


def test_one_run_that_fails_stops_no_other(two, monkeypatch, capsys):
    make_one, calls = pipeline.make_one, []

    def failing(preset, settings, stage, *rest):
        calls.append(settings)
        if len(calls) == 1:
            return Diverged("it diverged")
        return make_one(preset, settings, stage, *rest)

    monkeypatch.setattr(pipeline, "make_one", failing)
    monkeypatch.setattr(frontier, "finals", lambda s, rates: [])
    pipeline.build(two, "groups", "groups")
    frontier.sweep(two, lambda runs, **more: pipeline.make_all(
        two, [j for j in runs if j[0] == "unlikelihood"], **more))
    assert "it diverged" in capsys.readouterr().out
    rates = rate_table(two)
    assert [row["share"] is None for row in rates] == [True, False], "it loses, and is named"
    assert [row["chosen"] for row in rates] == [False, True]


def test_a_run_of_the_figure_that_diverges_is_left_out_and_named(two, monkeypatch, capsys):
    make_one = pipeline.make_one
    monkeypatch.setattr(pipeline, "make_one", lambda preset, s, *rest: Diverged("it diverged")
                        if s.alpha == 1 else make_one(preset, s, *rest))
    pipeline.build(two, "groups", "groups")
    hashes = frontier.sweep(two, lambda runs, **more: pipeline.make_all(
        two, [j for j in runs if j[0] == "unlikelihood"], **more))
    assert len(hashes) == 2
    assert "1 runs diverged and are left out: unlikelihood alpha=1" in capsys.readouterr().out
    there = [p.setting for p in finals(two.s, frontier.chosen_rates(two))
             if frontier.finished(two, p)]
    assert there == ["alpha=0.5"]


@pytest.mark.parametrize("refusal", ["a full disk", "a folder in use"])
def test_any_other_failure_ends_the_sweep_before_a_rate_is_chosen_without_it(two, monkeypatch,
                                                                             refusal):
    monkeypatch.setattr(pipeline, "make_one", lambda *a: UserError(refusal))
    pipeline.build(two, "groups", "groups")
    with pytest.raises(UserError, match=refusal):
        frontier.sweep(two, lambda runs, **more: pipeline.make_all(two, runs, **more))


def test_the_share_is_of_the_optimum_over_the_second_half_of_the_points(two, monkeypatch):
    """Points past KL 3 do not count; where all are, the nearest ranks first."""
    curve = [dict(kl=0.0, reward=0.5), dict(kl=1.0, reward=0.8), dict(kl=4.0, reward=1.0)]
    two.before = dict(optimum=curve, valid_reward=0.4)
    points = [dict(valid_kl=kl, valid_reward=r) for kl, r in (
        (0.5, 0.0), (1.0, 0.0), (1.0, 0.7), (2.5, 0.6), (3.1, 0.9))]
    monkeypatch.setattr(frontier, "evaluations", lambda ctx, p: points)
    assert frontier.share(two, None) == pytest.approx((0.3 / 0.3 + 0.2 / 0.4) / 2)
    points[2:] = [dict(valid_kl=3.5, valid_reward=1.0)]
    points.pop(0)
    assert frontier.share(two, None) == -3.5


def test_ctrl_c_stops_the_sweep(two, monkeypatch):
    monkeypatch.setattr(pipeline, "make_one", lambda *a: Interrupted("saved at step 1"))
    pipeline.build(two, "groups", "groups")
    with pytest.raises(Interrupted):
        frontier.sweep(two, lambda runs, **more: pipeline.make_all(two, runs, **more))


def test_ctrl_c_reaches_the_workers_and_the_same_sweep_goes_on(two, monkeypatch):
    """SIGINT to the whole group, as a terminal sends it, after the first run has ended."""
    pipeline.build(two, "groups", "groups")
    monkeypatch.setattr(frontier, "chosen_rates", lambda ctx: {})

    def sweep(done=lambda *a: None):
        return pipeline.make_all(two, [(p.stage, p.settings) for p in candidates(two.s)], 2, done)

    def work():
        os.setpgrp()
        signal.signal(signal.SIGINT, pipeline.stop)

        def done(*_):
            os.killpg(0, signal.SIGINT)
            raise Interrupted("as sweep does") if STOP else AssertionError("no one heard")

        try:
            sweep(done)
        except Interrupted:
            return 130

    code, text = in_child(work)
    assert code == 130, text
    assert len(sweep()) == 2, "what ended is kept, what was stopped goes on"


def test_a_sweep_over_a_parent_that_changed(chain, copied):
    out = copied("sft", "groups")
    argv = ["--stage", "frontier", *FEW, "--out", out, "--data", chain.data]
    model = folder(out, "sft") / "model.pt"
    model.write_bytes(model.read_bytes()[:-100])
    refused(command(*argv), "sft has changed since", "delete")
