"""Laws of points.py: the hull is what mixing gives, the table finds what was put in, and what is no
point is named. Numpy alone, synthetic worlds."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from points import about, area, envelope, excesses, read_points, table, table_text

P = 60
SPREAD = np.random.default_rng(7).normal(size=P) * 0.1  # a prompt's own height: mean 0
SPREAD -= SPREAD.mean()
START = 0.5


def best_reward(kl):
    """The world's optimum: concave in KL, as Eq. 3's is."""
    return START + 0.45 * (1 - np.exp(-1.2 * np.asarray(kl)))


def frontier_point(method, setting="", kl=0.0, reward=START, noise=None, **more) -> dict:
    """A line of frontier.jsonl whose means are kl and reward, and whose prompts differ."""
    rewards = reward + SPREAD + (0 if noise is None else noise)
    kls = kl * (1 + SPREAD)
    return dict(preset="toy", model="0.19M parameters", method=method, setting=setting, seed=0,
                step=0, temperature=1.0, reward=float(np.mean(rewards)), reward_se=0.01, kl=kl,
                kl_se=0.02, kl_mc=kl, kl_mc_se=0.05, length=28.0, eos=0.99, distinct2=0.2,
                repetition=0.0, grammatical=0.9, ref_ppl=2.8, reward_learned=None, win=None,
                ess=None, seconds=None, samples=None, forwards=None, rewards=rewards.tolist(),
                kls=np.broadcast_to(kls, P).tolist()) | more


def run_of(method, setting, kls, share, **more) -> list[dict]:
    """Points at `kls` with a share of the optimum's gain, ten seconds and 100 samples apart."""
    return [frontier_point(method, setting, kl, START + share * (best_reward(kl) - START),
                           step=10 * i, seconds=10.0 * i, samples=100 * i, forwards=1000 * i,
                           **more) for i, kl in enumerate(kls, 1)]


GRID = np.arange(1, 36) / 10  # the optimum's KLs: 0.1 to 3.5


def world() -> list[dict]:
    """π_ref, the optimum, and a policy on it, one half-way, and one that stays near."""
    return [frontier_point("sft", win=0.5, reward_learned=0.0), *(
        frontier_point("optimum", f"1/beta={kl:g}", kl, best_reward(kl), ess=40 / kl)
        for kl in GRID), *run_of("dpo", "beta=1", GRID, 1.0), *run_of("ppo", "target=3", GRID, 0.5),
        *run_of("preferred-ft", "", [0.1, 0.2], 0.8)]


def mixtures(kl, reward, at, start):
    """The envelope by brute force: every pair of policies, mixed to have KL at most `at`."""
    points = [(0.0, start), *zip(kl, reward)]
    best = np.full(len(at), -np.inf)
    for (ka, ra), (kb, rb) in ((a, b) for a in points for b in points):
        for i, x in enumerate(at):
            if ka <= x:
                share = 1.0 if kb <= x else (x - ka) / (kb - ka)
                best[i] = max(best[i], (1 - share) * ra + share * rb, ra)
    return best


def test_the_envelope_is_the_best_that_mixing_can_do():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 8, 15):
        kl, reward = rng.uniform(0.01, 4, n), rng.uniform(0, 1, n)
        start, at = rng.uniform(0, 1), np.linspace(0, kl.max(), 41)
        got = envelope(kl, reward, at, start)
        np.testing.assert_allclose(got, mixtures(kl, reward, at, start), atol=1e-12)
        order = rng.permutation(n)
        np.testing.assert_array_equal(got, envelope(kl[order], reward[order], at, start))
        assert got[0] == start, "at KL 0 there is only π_ref"
        slopes = np.diff(got)
        assert (slopes >= -1e-12).all() and (np.diff(slopes) <= 1e-12).all(), "concave, never down"
        assert (envelope(kl, reward, kl, start) >= reward - 1e-12).all(), "a point above the hull"


def test_the_envelope_is_flat_after_its_top_and_ends_with_the_points():
    got = envelope([1, 3], [0.9, 0.6], [0.5, 1, 2, 3, 3.1], 0.5)
    np.testing.assert_allclose(got, [0.7, 0.9, 0.9, 0.9, np.nan])
    np.testing.assert_allclose(envelope([1, 3], [0.9, 0.6], [3.1, 99], 0.5, flat=True), 0.9)
    np.testing.assert_allclose(envelope([2], [0.2], [1, 2], 0.5), 0.5, err_msg="π_ref is better")
    np.testing.assert_allclose(envelope([0, 2], [0.9, 0.7], [1], 0.5), 0.6,
                               err_msg="at KL 0 there is only π_ref")


def test_many_envelopes_at_once_are_those_one_by_one_and_a_nan_is_no_point():
    rng = np.random.default_rng(1)
    kl, reward = rng.uniform(0.01, 4, (30, 12)), rng.uniform(0, 1, (30, 12))
    start, at = rng.uniform(0, 0.6, 30), np.linspace(0, 4, 9)
    kl[::3, 5] = reward[::3, 5] = np.nan
    together, areas = envelope(kl, reward, at, start), area(kl, reward, 3, start)
    for k, r, s, height, mean in zip(kl, reward, start, together, areas):
        there = ~np.isnan(k)
        np.testing.assert_allclose(height, envelope(k[there], r[there], at, s), atol=1e-12)
        np.testing.assert_allclose(mean, area(k[there], r[there], 3, s), atol=1e-12)


def test_the_area_is_the_integral_of_the_envelope():
    rng = np.random.default_rng(2)
    for _ in range(5):
        kl, reward = rng.uniform(0.01, 4, 9), rng.uniform(0, 1, 9)
        middle = (np.arange(20_000) + 0.5) / 20_000 * 3
        by_sum = envelope(kl, reward, middle, 0.4, flat=True).mean() - 0.4
        np.testing.assert_allclose(area(kl, reward, 3, 0.4), by_sum, atol=1e-7)
    np.testing.assert_allclose(area([1], [0.9], 3, 0.5), (0.2 + 0.8) / 3)  # up to KL 1, then flat
    assert area([1, 2], [0.3, 0.4], 3, 0.5) == 0, "never better than π_ref"


def test_the_table_finds_what_was_put_in():
    rows = {row["method"]: row for row in table(world(), bootstrap=100)}
    assert list(rows) == ["optimum", "dpo", "ppo", "preferred-ft"], "π_ref has no row, it is 0"
    for kl in (1, 2, 3):
        for method, share in (("optimum", 1), ("dpo", 1), ("ppo", 0.5)):
            value, low, high = rows[method]["reward"][kl]
            np.testing.assert_allclose(value, START + share * (best_reward(kl) - START), atol=1e-9)
            np.testing.assert_allclose(rows[method]["share"][kl], share, atol=1e-3,
                                       err_msg="prompts differ alike in all: shares are paired")
            assert low < value < high, "prompts differ, so the reward is uncertain"
        assert rows["preferred-ft"]["reward"][kl] is rows["preferred-ft"]["share"][kl] is None
    ends = np.concatenate([[0], GRID[GRID <= 3]])
    want = np.trapezoid(best_reward(ends) - START, ends) / 3
    np.testing.assert_allclose(rows["dpo"]["area"][0], want, atol=1e-9)
    np.testing.assert_allclose(rows["ppo"]["area"][0], want / 2, atol=1e-9)
    assert rows["preferred-ft"]["largest"] == pytest.approx(0.2)


def test_costs_are_summed_over_runs_each_at_its_last_point():
    points = world() + run_of("dpo", "beta=5", [0.3, 0.2], 0.9) + \
        run_of("dpo", "beta=1", GRID[:4], 1.0, seed=1)
    row, = [r for r in table(points, bootstrap=10) if r["method"] == "dpo"]
    assert (row["runs"], row["seeds"]) == (3, 2)
    assert row["seconds"] == 350 + 20 + 40 and row["samples"] == 10 * row["seconds"]
    points += [frontier_point("best-of-n", f"N={n}", n / 9, 0.6, samples=P * n) for n in (1, 4, 16)]
    optimum, *_, best_of = table(points, bootstrap=10)
    assert best_of["samples"] == 16 * P, "one draw serves every N"
    assert optimum["seconds"] is None, "nothing was measured"
    line, = [x for x in table_text(points, [optimum]).splitlines() if x.startswith("| optimum") and
             x.split("|")[-2].strip() == "-"]
    assert line.split("|")[-4].strip() == "-"


def test_seeds_are_drawn_again_too():
    def width(seeds):
        noise = np.array([0.05, -0.05, 0.0]) if seeds == 3 else [0.0]
        points = world()[: len(GRID) + 1]
        for seed, shift in enumerate(noise):
            points += run_of("dpo", "beta=1", GRID, 0.8, seed=seed, noise=shift)
        row = table(points, bootstrap=300)[1]
        value, low, high = row["reward"][2]
        assert value == pytest.approx(START + 0.8 * (best_reward(2) - START)), "the seeds' mean"
        return high - low

    assert width(3) > 1.5 * width(1), "runs that differ by their seed must widen the interval"
    uneven = world() + run_of("unlikelihood", "alpha=1", [0.5, 1.5], 0.5) + \
        run_of("unlikelihood", "alpha=1", [0.5, 1.5, 2.5], 0.5, seed=1)
    assert all(np.isfinite(r["reward"][2]).all() for r in table(uneven, 50)
               if r["method"] == "unlikelihood"), "a step that one seed alone has"


def test_the_intervals_cover_the_truth_although_the_envelope_takes_the_best_of_noise():
    """Twenty noisy points near one curve: their envelope is a maximum, and lies too high."""
    rng, kls = np.random.default_rng(3), np.linspace(0.2, 3.4, 20)
    covered, off, trials = 0, 0.0, 40
    for _ in range(trials):
        points = world()[: len(GRID) + 1] + [
            frontier_point("dpo", f"beta={i}", kl, best_reward(kl) - 0.1,
                           noise=rng.normal(size=P) * 0.15) for i, kl in enumerate(kls)]
        value, low, high = table(points, bootstrap=150)[1]["reward"][2]
        truth = envelope(kls, best_reward(kls) - 0.1, [2.0], START)[0]
        covered += low <= truth <= high
        off += (value - truth) / trials
    assert off > 0, "a maximum over noise should lie too high here"
    assert covered >= 0.85 * trials, f"{covered} of {trials} intervals hold the truth"


def test_the_same_points_give_the_same_table():
    assert table(world(), 20, seed=3) == table(world(), 20, seed=3) != table(world(), 20, seed=4)


def test_what_lies_above_the_optimum_is_found_and_named():
    rng = np.random.default_rng(4)
    honest = world() + [frontier_point("ppo-gt", f"target={i}", kl, best_reward(kl) - 0.02,
                                       noise=rng.normal(size=P) * 0.05)
                        for i, kl in enumerate(GRID[2:20])]
    found = excesses(honest)
    assert len(found) == 34 + 34 + 1 + 18, "the points past the optimum's first, up to its last"
    assert found[0][0] < 3 and "more than 3 above it: none" in table_text(honest, table(honest, 10))
    noise = rng.normal(size=P) * 0.05
    liar = frontier_point("ppo-gt", "target=9", 1.23, best_reward(1.23) + 0.1, step=70, seed=2,
                          noise=noise - noise.mean())
    (z, worst), *_ = excesses(honest + [liar])
    assert worst is liar and z == pytest.approx(0.1 / (noise.std(ddof=1) / P ** 0.5), rel=0.03)
    kls = np.array(liar["kls"]) + 2 * noise  # a prompt's luck in KL is worth the curve's slope
    slope = np.diff(best_reward([1.2, 1.3]))[0] / 0.1
    (paired, _), *_ = excesses(honest + [liar | dict(kls=kls.tolist())])
    assert paired == pytest.approx(z / (1 - 2 * slope), rel=0.05)
    text = table_text(honest + [liar], table(honest + [liar], 10))
    assert f"ppo-gt target=9 (seed 2, step 70) by {z:.1f}" in text
    far = frontier_point("ppo-gt", "target=9", 9.0, 0.99)
    assert len(excesses(honest + [far])) == len(found), "no verdict where it is not trusted"


@pytest.mark.parametrize("name", ["toy", "imdb-cpu"])
def test_eq04_nothing_committed_lies_above_the_optimum(name):
    points = read_points(Path(__file__).parents[1] / "results" / name / "frontier.jsonl")
    found = excesses(points)
    assert len(found) > 50 and found[0][0] < 3, found[0]


def test_a_caption_names_the_methods_that_have_other_seeds_than_most():
    points = [frontier_point(method, "", 1.0, 0.6) | dict(seed=seed) for method, seeds in (
        ("dpo", (0, 1)), ("ppo", (0, 1)), ("dpo-soft", (0,)), ("dpo-sampled", (0,)),
        ("preferred-ft", (0, 1)), ("best-of-n", (0,))) for seed in seeds]
    assert "; seeds 0, 1 (dpo-soft, dpo-sampled: 0); " in about(points)
    assert "; seed 0; " in about(points[:1])


def test_an_optimum_of_few_effective_samples_is_not_trusted():
    points = [p | dict(ess=2.9) if p["method"] == "optimum" and p["kl"] > 1.55 else p
              for p in world()]
    rows = {row["method"]: row for row in table(points, 20)}
    assert rows["dpo"]["share"][1] and rows["dpo"]["reward"][2] and not rows["dpo"]["share"][2]
    text = table_text(points, list(rows.values()))
    assert "optimum has no trusted point at KL 2 or beyond: its largest KL is 1.50." in text
    nobody = [p for p in points if p["method"] != "optimum"]
    text = table_text(nobody, table(nobody, 20))
    assert "No point lies where the optimum is trusted" in text and "0.5" in text


def test_the_text_is_markdown_that_lines_up_and_says_what_is_missing():
    points = world()
    text = table_text(points, table(points, 20))
    blocks = [[x for x in part.splitlines()] for part in text.split("\n\n") if part[0] == "|"]
    assert len(blocks) == 3 and all(len(b) == 2 + 4 for b in blocks)
    assert all(len({len(x) for x in b}) == 1 for b in blocks), "columns do not line up"
    assert all(set(b[1]) == set("|- ") and b[0].startswith("| method") for b in blocks)
    assert [c.strip() for c in blocks[0][-1].split("|")[2:-1]] == ["-"] * 3
    assert "preferred-ft has no point at KL 1 or beyond: its largest KL is 0.20." in text
    assert "60 test prompts" in text and "seed 0;" in text and "0.19M parameters" in text
    imdb = [p | dict(preset="imdb") for p in points]
    assert "KL 10" in table_text(imdb, table(imdb, 5)) and "KL 10" not in text


# ------------------------------------------------------------------------------ the file

def write_points(folder: Path, lines) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "frontier.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n"
                              for x in lines))
    return path


def test_lines_that_are_no_points_are_skipped_counted_and_named(tmp_path, capsys):
    good = world()[:6]
    short = good[1] | dict(rewards=[0.5, 0.4], kls=[0.1, 0.2])
    foreign = [b"", b"{torn", b"[1, 2]", b"7", b"null", b"\xff\xfe", b"[" * 5000,
               good[0] | dict(kl=None), {k: v for k, v in good[0].items() if k != "ess"}, short,
               good[2] | dict(kls=[0.1]),
               good[0] | dict(preset="imdb"), good[0] | dict(reward=math.nan),
               good[0] | dict(rewards="x"), good[0] | dict(setting="beta=?"),
               good[0] | dict(method=None), good[0] | dict(preset=["toy"]),
               good[0] | dict(model=None), good[0] | dict(seed=None), good[0] | dict(step="x"),
               good[0] | dict(ess="x"), good[0] | dict(seconds="x"), good[0] | dict(win=[1])]
    path = write_points(tmp_path, [*good[:3], *foreign, *good[3:]])
    assert read_points(path) == good, "the points before and after are kept, in order"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(
        f"lines {', '.join(str(4 + i) for i in range(len(foreign)))}\n")
    assert said.startswith(f"skipped {len(foreign)} lines of {path} that are no points: ")
    read_points(write_points(tmp_path, [*good, b"{"]))
    assert capsys.readouterr().err == f"skipped 1 line of {path} that is no point: line 7\n"
    read_points(write_points(tmp_path, good))
    assert capsys.readouterr().err == ""
