"""Laws of experiments/table.py: the table shows the known rewards of a synthetic world, its
intervals contain them, and points above the optimum are named. Needs numpy alone."""

import re
from pathlib import Path

import numpy as np
import pytest
from test_plot_frontier import GRID, START, P, best_reward, frontier_point, run_of, world

from experiments.table import excesses, table, table_text
from plot_frontier import STYLES, envelope, frontier
from support.points import read_points
from support.runs import UserError


def test_the_table_shows_the_rewards_of_a_known_world():
    rows = {row["method"]: row for row in table(world(), bootstrap=100)}
    assert list(rows) == ["optimum", "dpo", "ppo", "preferred-ft"], "π_ref has no row"
    for kl in (1, 2, 3):
        for method, share in (("optimum", 1), ("dpo", 1), ("ppo", 0.5)):
            value, low, high = rows[method]["reward"][kl]
            np.testing.assert_allclose(value, START + share * (best_reward(kl) - START), atol=2e-4)
            np.testing.assert_allclose(rows[method]["share"][kl], share, atol=1e-3,
                                       err_msg="shares are paired by prompt")
            assert low < value < high, "prompts differ, so the reward is uncertain"
        assert rows["preferred-ft"]["reward"][kl] is rows["preferred-ft"]["share"][kl] is None
    assert rows["preferred-ft"]["largest"] == pytest.approx(0.2)


def test_two_prompts_are_enough_for_a_table():
    points = [p | dict(rewards=p["rewards"][:2], kls=p["kls"][:2]) for p in world()]
    value, low, high = table(points, 20)[1]["reward"][1]
    assert 0 < low <= value <= high or np.isfinite(value)


def test_costs_are_summed_over_runs_each_at_its_last_point():
    points = [p | dict(samples=64 * P) if p["method"] == "optimum" else p for p in world()]
    points += run_of("dpo", "beta=5", [0.3, 0.2], 0.9) + \
        run_of("dpo", "beta=1", GRID[:4], 1.0, seed=1)
    points += [frontier_point("best-of-n", f"N={n}", n / 9, 0.6, samples=P * n) for n in (1, 4, 16)]
    rows = {row["method"]: row for row in table(points, bootstrap=10)}
    assert (rows["dpo"]["runs"], rows["dpo"]["seeds"]) == (3, 2)
    assert (rows["dpo"]["seconds"], rows["dpo"]["samples"]) == (350 + 20 + 40, 3500 + 200 + 400)
    assert rows["best-of-n"]["samples"] == 16 * P, "all N share one draw"
    assert rows["optimum"]["samples"] == 64 * P, "all β share one draw"
    assert rows["optimum"]["seconds"] is None, "none were measured"


def test_a_replicate_draws_seeds_as_well_as_prompts():
    def width(seeds):
        noise = [0.05, -0.05, 0.0] if seeds == 3 else [0.0]
        points = world()[: len(GRID) + 1]
        for seed, shift in enumerate(noise):
            points += run_of("dpo", "beta=1", GRID, 0.8, seed=seed, noise=shift)
        row = table(points, bootstrap=300)[1]
        value, low, high = row["reward"][2]
        truth = START + 0.8 * (best_reward(2) - START)
        assert value == pytest.approx(truth, abs=2e-4), "the seeds' mean"
        return high - low

    assert width(3) > 1.5 * width(1), "differences between seeds must widen the interval"
    uneven = world() + run_of("unlikelihood", "alpha=1", [0.5, 1.5], 0.5) + \
        run_of("unlikelihood", "alpha=1", [0.5, 1.5, 2.5], 0.5, seed=1)
    row, = [r for r in table(uneven, 50) if r["method"] == "unlikelihood"]
    assert np.isfinite(row["reward"][2]).all(), "only one seed has the last step"


def test_cross_fitted_rewards_are_not_too_high_although_the_envelope_is():
    """Twenty noisy points near one curve. Their envelope, a maximum over noise, is too high. It is
    not too high on other prompts than those that chose it."""
    rng, kls = np.random.default_rng(3), np.linspace(0.2, 3.4, 20)
    truth = envelope(kls, best_reward(kls) - 0.1, [2.0], START)[0]
    covered, off, hull_off, trials = 0, 0.0, 0.0, 40
    for _ in range(trials):
        points = world()[: len(GRID) + 1] + [
            frontier_point("dpo", f"beta={i}", kl, best_reward(kl) - 0.1,
                           noise=rng.normal(size=P) * 0.15) for i, kl in enumerate(kls)]
        value, low, high = table(points, bootstrap=150)[1]["reward"][2]
        hull = envelope(*np.array([(p["kl"], p["reward"]) for p in points if p["method"] == "dpo"]
                                  ).T, [2.0], START)[0]
        covered += low <= truth <= high
        off, hull_off = off + (value - truth) / trials, hull_off + (hull - truth) / trials
    assert hull_off > 0.005, "a maximum over noise should be too high here"
    assert -0.012 < off < 0.001, off
    assert covered >= 0.85 * trials, f"{covered} of {trials} intervals contain the truth"


@pytest.mark.parametrize("points", [2, 5])
def test_fig2_shows_the_shares_of_the_table(points):
    """Noisy policies, of which the envelope takes the best: both must be cross-fit."""
    rng = np.random.default_rng(5)
    noisy = [frontier_point(method, f"beta={i}", kl, 0.5 + 0.3 * kl ** 0.5 / 2, seed=seed,
                            noise=rng.normal(size=P) * 0.3)
             for method in ("dpo", "ppo") for seed in (0, 1)
             for i, kl in enumerate(np.linspace(0.2, 3.4, 4 * points))]
    noisy = world()[: len(GRID) + 1] + noisy + run_of("preferred-ft", "", [0.4, 1.2], 0.5)
    rows, share = table(noisy, bootstrap=2), frontier(noisy).axes[1]
    lines = {line.get_color(): line.get_xydata() for line in share.get_lines()}
    for row in rows[1:]:
        drawn = {round(x, 2): y for x, y in lines[STYLES[row["method"]][1]]}
        for kl, value in row["share"].items():
            if value is None:
                assert np.isnan(drawn[kl]), "past its largest KL a method has no share"
            else:
                assert drawn[kl] == pytest.approx(value[0], abs=1e-9)
    assert min(drawn) == 0.3 and 3.4 < max(drawn) <= 3.5, "where the optimum is reliable"


def test_the_same_points_give_the_same_table():
    assert table(world(), 20, seed=3) == table(world(), 20, seed=3) != table(world(), 20, seed=4)


def test_points_above_the_optimum_are_found_and_named():
    rng = np.random.default_rng(4)
    honest = world() + [frontier_point("ppo-gt", f"target={i}", kl, best_reward(kl) - 0.02,
                                       noise=rng.normal(size=P) * 0.05)
                        for i, kl in enumerate(GRID[2:20])]
    found = excesses(honest)
    assert len(found) == 34 + 34 + 1 + 18, "the points between the optimum's first and last"
    assert found[0][0] < 3 and "errors above it: none" in table_text(honest, table(honest, 10))
    noise = rng.normal(size=P) * 0.05
    liar = frontier_point("ppo-gt", "target=9", 1.23, best_reward(1.23) + 0.03, step=70, seed=2,
                          noise=noise - noise.mean())
    (z, worst), *_ = excesses(honest + [liar])
    assert worst is liar and z == pytest.approx(0.03 / (noise.std(ddof=1) / P ** 0.5), rel=0.03)
    kls = np.array(liar["kls"]) + 2 * noise  # noise in KL counts times the slope
    slope = np.diff(best_reward([1.2, 1.3]))[0] / 0.1
    (paired, _), *_ = excesses(honest + [liar | dict(kls=kls.tolist())])
    assert paired == pytest.approx(z / (1 - 2 * slope), rel=0.05)
    text = " ".join(table_text(honest + [liar], table(honest + [liar], 10)).split())
    assert f"ppo-gt target=9 (seed 2, step 70) by {z:.1f}" in text
    far = frontier_point("ppo-gt", "target=9", 9.0, 0.99)
    cold = frontier_point("ppo-gt", "target=9", 1.23, 0.99, temperature=0.5)
    assert len(excesses(honest + [far, cold])) == len(found), \
        "only at temperature 1, where the optimum is reliable"


@pytest.mark.parametrize("name", ["toy", "imdb-cpu"])
def test_eq04_no_point_of_the_committed_results_lies_above_the_optimum(name):
    points = read_points(Path(__file__).parents[1] / "results" / name / "frontier.jsonl")
    found = excesses(points)
    assert len(found) > 50 and found[0][0] < 3, found[0]


def test_no_point_is_compared_with_an_optimum_that_is_not_reliable():
    points = [p | dict(ess=2.9) if p["method"] == "optimum" and p["kl"] > 1.55 else p
              for p in world()]
    rows = {row["method"]: row for row in table(points, 20)}
    assert rows["dpo"]["share"][1] and rows["dpo"]["reward"][2] and not rows["dpo"]["share"][2]
    text = table_text(points, list(rows.values()))
    assert "optimum has no reliable point at KL 2 or beyond: its largest KL is 1.50." in text
    late = [p for p in points if p["method"] != "optimum" or p["kl"] > 1.05]
    assert table(late, 20)[0]["reward"][1] is None, "none below its first reliable point"
    nobody = [p for p in points if p["method"] != "optimum"]
    assert "No point lies where the optimum is reliable" in table_text(nobody, table(nobody, 20))


def test_the_text_is_aligned_markdown_and_names_what_is_missing():
    points = world()
    text = table_text(points, table(points, 20))
    blocks = [part.splitlines() for part in text.split("\n\n") if part[0] == "|"]
    assert len(blocks) == 3 and all(len(b) == 2 + 4 for b in blocks)
    assert all(len({len(x) for x in b}) == 1 for b in blocks), "columns are not aligned"
    assert all(set(b[1]) == set("|- ") and b[0].startswith("| method") for b in blocks)
    cells = [[[c.strip() for c in line.split("|")[2:-1]] for line in b] for b in blocks]
    assert cells[0][-1] == ["-"] * 3, "preferred-ft reaches none of the KLs"
    assert cells[2][0] == ["runs", "seeds", "seconds", "samples"]
    assert cells[2][3] == ["1", "1", "350", "3,500"] and cells[2][2][2:] == ["-", "-"]
    assert "preferred-ft has no point at KL 1 or beyond: its largest KL is 0.20." in text
    assert "60 test prompts" in text and " Seeds: 0. " in text and "0.19M parameters" in text


def test_a_table_of_five_kls_fits_100_columns_and_stays_markdown():
    """imdb's KLs are 1, 2, 3, 5 and 10. A KL that no method reaches has no column."""
    points = [p | dict(preset="imdb") for p in world() + run_of("dpo", "beta=0.1", [4, 6], 1.0)]
    long = [p | dict(method="best-of-n-implicit") for p in points if p["method"] == "preferred-ft"]
    rows = table(points + long, 20)
    text = table_text(points + long, rows)
    assert max(map(len, text.splitlines())) <= 100
    prose = [part for part in text.split("\n\n") if part[0] not in "|-"]
    assert not any(re.match(r"([-+*]|\d+[.)]|#+|>)(\s|$)", line)
                   for part in prose for line in part.split("\n")), "a wrapped line is no list"
    notes = text.split("\n\n")[-1].splitlines()
    assert {line[:2] for line in notes} == {"- ", "  "}, "a note's further lines belong to it"
    heads = [line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| method")]
    assert [[cell.strip() for cell in head] for head in heads] == [
        ["KL 1", "KL 2", "KL 3"], ["KL 5"], ["KL 1", "KL 2", "KL 3"],
        ["runs", "seeds", "seconds", "samples"]], "rewards, shares, cost"
    for row in rows:
        for value in filter(None, [*row["reward"].values(), *row["share"].values()]):
            assert "{:.3f} ({:.3f}, {:.3f})".format(*value) in text


def test_a_frontier_without_pi_ref_is_refused():
    with pytest.raises(UserError, match="no point of sft"):
        table(world()[1:])
