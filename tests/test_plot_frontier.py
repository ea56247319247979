"""Laws of plot_frontier.py: mixtures reach the hull and no more. Figure 2 and the training curves
show the logged numbers, have labels, and nothing in them is cut off.

test_points.py, test_table.py and test_figures.py use the synthetic worlds of this file too.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import plot_frontier
from plot_frontier import STYLES, caption, envelope, frontier, main, reliable_optimum
from support.curves import save_figure
from support.runs import hash_of_files

# ------------------------------------------------------------------------------ a synthetic world

P = 60
SPREAD = np.random.default_rng(7).normal(size=P) * 0.1  # how prompts differ: mean 0
SPREAD -= SPREAD.mean()
START = 0.5
GRID = np.arange(1, 36) / 10  # the optimum's KLs: 0.1 to 3.5


def best_reward(kl):
    """The world's optimum: concave in KL, like the optimum of Eq. 3."""
    return START + 0.45 * (1 - np.exp(-1.2 * np.asarray(kl)))


def frontier_point(method, setting="", kl=0.0, reward=START, noise=0.0, **more) -> dict:
    """A line of frontier.jsonl with means kl and reward over prompts that differ."""
    rewards = reward + SPREAD + noise
    return dict(preset="toy", model="0.19M parameters", method=method, setting=setting, seed=0,
                step=0, temperature=1.0, reward=float(np.mean(rewards)), reward_se=0.01, kl=kl,
                kl_se=0.02, kl_mc=kl, kl_mc_se=0.05, length=28.0, eos=0.99, distinct2=0.2,
                repetition=0.0, grammatical=0.9, ref_ppl=2.8, win=None,
                ess=None, seconds=None, samples=None, rewards=rewards.tolist(),
                kls=(kl * (1 + SPREAD)).tolist()) | more


def run_of(method, setting, kls, share, **more) -> list[dict]:
    """Points at `kls` with a share of the optimum's gain, ten seconds and 100 samples apart."""
    return [frontier_point(method, setting, kl, START + share * (best_reward(kl) - START),
                           step=10 * i, seconds=10.0 * i, samples=100 * i, **more)
            for i, kl in enumerate(kls, 1)]


def world() -> list[dict]:
    """π_ref, the optimum, a policy on it, one with half of its gain, and one near π_ref."""
    return [frontier_point("sft", win=0.5), *(
        frontier_point("optimum", f"1/beta={kl:g}", kl, best_reward(kl), ess=40 / kl)
        for kl in GRID), *run_of("dpo", "beta=1", GRID, 1.0), *run_of("ppo", "target=3", GRID, 0.5),
        *run_of("preferred-ft", "", [0.1, 0.2], 0.8)]


def full_world() -> list[dict]:
    """All kinds of points in one sweep: every method, three seeds, temperatures, large KLs."""
    points = world()
    for seed in (0, 1, 2):
        points += run_of("dpo", "beta=0.05", [1, 4, 9, 20], 1.0, seed=seed)
        points += run_of("plackett-luce", "beta=1", GRID[::6], 0.9, seed=seed)
        points += run_of("ppo", "target=1", GRID[:10], 0.6, seed=seed)
        points += run_of("ppo-gt", "target=1", GRID[:12], 0.9, seed=seed)
        points += run_of("unlikelihood", "alpha=1", GRID[::5], 0.6, seed=seed)
        points += run_of("dpo-online", "beta=3", GRID[4:30:5], 0.98, seed=seed)
        points += run_of("dpo-self", "beta=3", GRID[4:30:5], 0.85, seed=seed)
    for method in ("best-of-n", "best-of-n-learned"):
        points += [frontier_point(method, f"N={n}", k, START + 0.7 * (best_reward(k) - START))
                   for n in (1, 4, 64) if (k := math.log(n) - (n - 1) / n) >= 0]
    for s in (0.5, 2, 50):  # 50 is past the optimum
        points += run_of("dpo-soft", f"s/beta={s:g}", [0.3, 0.9 * min(s, 3)], 0.97)
        points += run_of("dpo-sampled", f"s/beta={s:g}", [0.3, 0.8 * min(s, 3)], 0.9)
    for method, setting, step in ("sft", "", 0), ("dpo", "beta=1", 350), ("ppo", "target=3", 350):
        points += [frontier_point(method, setting, 1.0, 0.6, step=step, temperature=t,
                                  win=0.6 + t / 9) for t in (0, 0.25, 0.5, 0.75)]
    points.append(frontier_point("ppo-gt", "target=1", 1.0, 0.6, temperature=0.5))  # not compared
    return [p | dict(win=0.7) if p["step"] == 350 and p["win"] is None else p for p in points]


def write_points(folder: Path, lines) -> Path:
    """Write folder/frontier.jsonl: points, and lines that are given as bytes."""
    folder.mkdir(exist_ok=True)
    path = folder / "frontier.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n"
                              for x in lines))
    return path


def step_row(i: int, n: int) -> dict:
    """A row like that which a dpo run logs at step i of n."""
    t, noise = i / max(1, n), math.sin(7.1 * i)
    chosen, rejected = -0.3 * t, -1.1 * t
    row = dict(step=i, loss=math.log(2) - 0.25 * t + 0.01 * noise * (i > 0), margin=0.8 * t,
               reward_chosen=chosen, reward_rejected=rejected, logp_chosen=-31 + noise + chosen,
               logp_rejected=-33 + noise + rejected, accuracy=0.5 + 0.3 * t, weight=0.5 - 0.15 * t)
    return row | {f"weight_{p}": 0.5 - 0.15 * t + (p - 50) / 100 * t for p in (5, 25, 50, 75, 95)}


def evaluation(t: float, reward: bool) -> dict:
    return dict(kl=1.3 * t, kl_se=0.03 * t, reward=0.5 + 0.3 * t if reward else None,
                reward_se=0.01 if reward else None)


BETA = 0.5  # of write_run's runs


def write_run(folder: Path, n: int, title: str = "DPO, β 0.5", reward: bool = True,
              loss: str = "pairwise") -> Path:
    """The folder of a run of n steps, and beside it the folder of its groups."""
    run, lines = folder / "toy" / "dpo", []
    run.mkdir(parents=True)
    for i in range(n):
        lines.append(step_row(i, n))
        if (i + 1) % max(1, n // 4) == 0:
            t = (i + 1) / n
            lines.append(dict(step=i, eval=evaluation(t, reward) | dict(accuracy=0.5 + 0.3 * t)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.json").write_text(json.dumps(dict(
        about=dict(stage="dpo", title=title), parents=dict(groups=hash_of_files(dict(x="mine"))),
        settings=dict(beta=BETA, loss=loss, num_completions=4))))
    optimum = [dict(kl=kl, reward=best_reward(kl), ess=8 / kl)
               for kl in (8.0, 1.0, 0.5, 3.0)] * reward
    for name, x in (("groups", "another's"), ("groups-x", "mine")):
        (run.parent / name).mkdir()
        (run.parent / name / "config.json").write_text(json.dumps(dict(files=dict(x=x))))
        (run.parent / name / "reference.json").write_text("{}" if x != "mine" else json.dumps(
            dict(point=evaluation(0, reward), optimum=optimum)))
    return run


# ------------------------------------------------------------------------------ looks at figures

def saved_by(draw) -> Figure:
    """The figure that draw() would save. It is not rendered, which takes a second."""
    figures = []

    def keep(self, file, **_):
        figures.append(self)
        file.write(b"-")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        draw()
    return figures[-1]


def legends_of(figure) -> list:
    return figure.legends + [ax.get_legend() for ax in figure.axes if ax.get_legend()]


def labels(figure) -> list[str]:
    return [text.get_text() for legend in legends_of(figure) for text in legend.get_texts()]


def line_of(ax, label: str):
    line, = [x for x in ax.get_lines() if x.get_label() == label]
    return line


def errorbars_of(ax) -> list[ErrorbarContainer]:
    return [c for c in ax.containers if isinstance(c, ErrorbarContainer)]


def assert_nothing_is_cut_off(figure, legends_beside: bool = True) -> None:
    """Everything lies on the page, and no legend covers a panel or a panel's title."""
    figure.draw_without_rendering()
    renderer, page = FigureCanvasAgg(figure).get_renderer(), figure.bbox.padded(1)
    for part in filter(None, (*figure.axes, *figure.legends, figure._supxlabel, figure._suptitle)):
        (x0, y0), (x1, y1) = part.get_tightbbox(renderer).get_points()
        assert page.x0 <= x0 and x1 <= page.x1 and page.y0 <= y0 and y1 <= page.y1, \
            f"{part} leaves the page"
    for legend in legends_of(figure) if legends_beside else figure.legends:
        box = legend.get_window_extent(renderer)
        for ax in figure.axes:
            assert not box.overlaps(ax.get_window_extent(renderer)), f"a legend lies on {ax}"
            title = ax.title.get_window_extent(renderer)
            assert not (ax.get_title() and box.overlaps(title)), f"a legend on {ax.get_title()!r}"


# ------------------------------------------------------------------------------ the envelope

def mixtures(kl, reward, at, start):
    """The envelope by brute force: the best mixture of any two policies with KL at most `at`."""
    points = [(0.0, start), *zip(kl, reward)]
    best = np.full(len(at), -np.inf)
    for (ka, ra), (kb, rb) in ((a, b) for a in points for b in points):
        for i, x in enumerate(at):
            if ka <= x:
                share = 1.0 if kb <= x else (x - ka) / (kb - ka)
                best[i] = max(best[i], (1 - share) * ra + share * rb, ra)
    return best


def test_the_envelope_is_the_reward_of_the_best_mixture():
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
        assert (slopes >= -1e-12).all() and (np.diff(slopes) <= 1e-12).all(), "concave, no fall"
        assert (envelope(kl, reward, kl, start) >= reward - 1e-12).all(), "a point above the hull"


def test_the_envelope_is_flat_after_its_maximum_and_ends_at_the_largest_kl():
    got = envelope([1, 3], [0.9, 0.6], [0.5, 1, 2, 3, 3.1], 0.5)
    np.testing.assert_allclose(got, [0.7, 0.9, 0.9, 0.9, np.nan])
    np.testing.assert_allclose(envelope([1, 3], [0.9, 0.6], [3.1, 99], 0.5, flat=True), 0.9)
    np.testing.assert_allclose(envelope([2], [0.2], [1, 2], 0.5), 0.5, err_msg="π_ref is better")
    np.testing.assert_allclose(envelope([0, 2], [0.9, 0.7], [1], 0.5), 0.6,
                               err_msg="at KL 0 there is only π_ref")


def test_mixtures_chosen_on_some_prompts_are_measured_on_others():
    kl, reward, start = [1.0, 3.0], [0.7, 0.9], 0.5
    own = envelope(kl, reward, [0.5, 2, 4], start, flat=True)
    np.testing.assert_allclose(envelope(kl, reward, [0.5, 2, 4], start, True,
                                        judges=(kl, reward, start)), own)
    got = envelope(kl, reward, [0.5, 2, 4], start, True, judges=([1.0, 3.0], [0.6, 0.8], 0.4))
    np.testing.assert_allclose(got, own - 0.1, err_msg="the same mixtures, 0.1 worse there")
    got = envelope(kl, reward, [0.5, 2, 4], start, True, judges=([1.1, 3.2], [0.7, 0.9], 0.5))
    # half of each: KL is 0.05 and 0.15 too large, corrected by the slope, which is 0 at last
    np.testing.assert_allclose(got, [0.6 - 0.2 * 0.05, 0.8 - 0.1 * 0.15, 0.9])


def test_a_batch_of_envelopes_equals_single_ones_and_a_nan_is_no_point():
    rng = np.random.default_rng(1)
    kl, reward = rng.uniform(0.01, 4, (30, 12)), rng.uniform(0, 1, (30, 12))
    start, at = rng.uniform(0, 0.6, 30), np.linspace(0, 4, 9)
    kl[::3, 5] = reward[::3, 5] = np.nan
    for k, r, s, height in zip(kl, reward, start, envelope(kl, reward, at, start)):
        there = ~np.isnan(k)
        np.testing.assert_allclose(height, envelope(k[there], r[there], at, s), atol=1e-12)


def test_cross_fit_chooses_outside_each_fold_and_measures_inside_it():
    """Two folds, two policies. Outside the first fold the first policy is the best mixture at every
    KL from 1 on, outside the second fold the second policy, at KL 2."""
    kl = np.array([[[1, 2], [1, 2]], [[1.5, 2], [1, 2]]])  # (outside or inside, fold, policy)
    reward = np.array([[[0.7, 0.6], [0.4, 0.8]], [[0.6, 0.9], [0.9, 0.8]]])
    start, at = np.array([[0.5, 0.4], [0.4, 0.6]]), [0.5, 1, 2, 3]
    # Each chosen policy gains 0.2 inside. At KL 0.5 the first fold takes half of its policy, which
    # has KL 0.75 inside: the hull's slope, 0.2, corrects this gain by 0.05.
    first, second = np.array([0.1 - 0.05, 0.2, 0.2, 0.2]), np.array([0.05, 0.1, 0.2, 0.2])
    np.testing.assert_allclose(plot_frontier.cross_fit(kl, reward, start, at, ideal=False),
                               (first + second) / 2)
    # the optimum chooses nothing: its points inside each fold, NaN below the first one
    np.testing.assert_allclose(plot_frontier.cross_fit(kl, reward, start, at, ideal=True),
                               [np.nan, np.nan, (0.5 + 0.2) / 2, (0.5 + 0.2) / 2])


# ------------------------------------------------------------------------------ the points

def test_an_optimum_of_few_effective_samples_is_not_reliable():
    kls = [p["kl"] for p in reliable_optimum(world()[::-1] + [
        frontier_point("optimum", "1/beta=9", 9.0, 0.9, ess=2.9),
        frontier_point("optimum", "1/beta=8", 8.0, 0.9, ess=3.0),
        frontier_point("optimum", "1/beta=7", 7.0, 0.9)])]
    assert kls == [*GRID, 8.0], "at least 3 per prompt, in the order of KL"


def test_a_caption_names_the_seeds_of_its_points_as_the_legend_does():
    points = [frontier_point(method, setting, 1.0, 0.6) | dict(seed=seed)
              for method, setting, seeds in (
                  ("dpo", "beta=1", (0, 1)), ("ppo", "target=1", (0, 1)), ("dpo-soft", "", (2,)),
                  ("dpo-sampled", "", (2,)), ("preferred-ft", "", (0, 1)), ("best-of-n", "", (0,)),
                  ("dpo", "beta=1 rate=0.0007", (0,))) for seed in seeds]
    assert (" Seeds: 0, 1; DPO on soft labels, DPO on sampled labels: 2; learning rates not chosen:"
            " 0. ") in caption(points)
    assert " Seeds: 0. " in caption(points[:1]), "none of methods that are not there"
    assert "Seeds" not in caption(points[-2:-1]), "Best-of-N has none"


# ------------------------------------------------------------------------------ Figure 2

@pytest.fixture(scope="module")
def figure2():
    return frontier(full_world())


def test_fig2_has_labels_units_and_a_caption_and_nothing_is_cut_off(figure2):
    ax, text = figure2.axes[0], figure2.get_supxlabel().replace("\n", " ")
    assert "nats" in ax.get_xlabel() and "from 0 to 1" in ax.get_ylabel()
    for words in ("Preset toy", "0.19M parameters", "Seeds: 0, 1, 2; ", "60 test prompts"):
        assert words in text
    assert "online" not in text and "labels" not in text, "methods that are not drawn here"
    assert all(ax.get_title() and ax.get_xlabel() and ax.get_ylabel() for ax in figure2.axes)
    assert_nothing_is_cut_off(figure2)


def test_fig2_has_a_panel_with_the_points_at_larger_kls(figure2):
    near, _, far = figure2.axes
    limit = near.get_xlim()[1]
    assert far.get_xscale() == "log" and far.get_xlim()[1] > 20
    assert limit == 1.05 * 4 == line_of(far, "where the left panel ends").get_xdata()[0]
    drawn = np.concatenate([c.lines[0].get_xdata() for c in errorbars_of(far)])
    beyond = sorted(p["kl"] for p in full_world() if p["kl"] > limit and p["temperature"] == 1)
    assert sorted(drawn[drawn > limit]) == beyond and len(beyond) == 6
    assert sorted(text.get_text() for text in far.texts) == ["β = 0.05"], "the others end before"
    assert not near.get_ylim()[1] < near.get_lines()[0].get_ydata().max()


def test_fig2_has_the_tilt_by_the_score_as_a_second_dashed_line():
    tilt = [frontier_point("score-tilt", f"1/beta={kl:g}", kl, 0.95 * best_reward(kl), ess=9)
            for kl in GRID]
    line, = [x for x in frontier(world() + tilt).axes[0].get_lines()
             if "tilt by the score" in str(x.get_label())]
    np.testing.assert_allclose(line.get_ydata(), 0.95 * best_reward(GRID))
    assert line.get_linestyle() == "--"


def test_fig2_has_one_line_per_method_on_its_envelope(figure2):
    ax, points, names = figure2.axes[0], full_world(), labels(figure2)
    assert len(names) == len(set(names)) == 9 + 3, "and the optimum, what is above it, the end"
    lines = {x.get_label(): x for x in ax.get_lines() if x.get_label() in names}
    optimum = lines.pop("optimum, Eq. 4")
    np.testing.assert_allclose(optimum.get_xydata(), np.stack([GRID, best_reward(GRID)], 1))
    assert optimum.get_linewidth() > max(x.get_linewidth() for x in lines.values())
    looks = {str((x.get_linestyle(), x._unscaled_dash_pattern)) for x in lines.values()}
    assert len(looks) == len({x.get_marker() for x in lines.values()}) == len(lines) == 8
    mine = [p for p in points if p["method"] == "dpo" and p["temperature"] == 1]
    kl, reward = np.array([(p["kl"], p["reward"]) for p in mine]).T
    x, y = lines["DPO"].get_data()
    np.testing.assert_allclose(y, envelope(kl, reward, x, START), atol=1e-9)
    assert x[0] == 0 and y[0] == START and x[-1] == ax.get_xlim()[1]


def test_fig2_fits_its_axes_to_the_policies_and_hatches_what_none_can_reach():
    """One policy at a large KL does not widen the axes: another panel shows it."""
    policies = run_of("preferred-ft", "", [0.5, 1.0, 300.0], 0.5)
    ax = frontier(world()[: len(GRID) + 1] + policies).axes[0]
    (_, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    assert 1.0 < right < 1.1 and low < START and best_reward(1.0) < high < best_reward(2.0)
    region, = [c for c in ax.collections if "out of reach" in str(c.get_label())]
    x, y = region.get_paths()[0].vertices.T
    assert (y >= best_reward(x) - 1e-9).all() and y.max() >= 1 and x.max() == 1.0


def test_fig2_shows_every_point_with_both_standard_errors(figure2):
    bars = errorbars_of(figure2.axes[0])
    assert len(bars) == 9 and all(c.has_xerr and c.has_yerr for c in bars)
    sideways, upright = bars[-1].lines[2]
    np.testing.assert_allclose([np.ptp(sideways.get_segments()[0][:, 0]),
                                np.ptp(upright.get_segments()[0][:, 1])], [0.04, 0.02])
    shown = [p for p in full_world() if p["temperature"] == 1
             and p["method"] != "optimum" and not p["method"].startswith("dpo-")]
    assert sum(len(c.lines[0].get_xdata()) for c in bars) == len(shown), "a point is not drawn"


def test_methods_have_different_shades_of_grey():
    def lightness(colour):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        y = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (
            0.2126, 0.7152, 0.0722)
        return 116 * np.cbrt(y) - 16  # L* of CIE 1976, 0 to 100

    grey = sorted(lightness(look[1]) for m, look in STYLES.items()
                  if m != "sft" and not m.startswith("dpo-"))  # these are in other figures
    assert np.diff(grey).min() > 5 and grey[-1] < 80, f"L* {np.round(grey)}"


def test_the_same_points_give_the_same_svg(tmp_path):
    one, two = (save_figure(figure, tmp_path / name).read_bytes() for figure, name in (
        (frontier(full_world()), "one.svg"), (frontier(full_world()), "two.svg")))
    assert one == two and one.lstrip().startswith(b"<?xml")


# ------------------------------------------------------------------------------ the command

def test_main_draws_a_file_a_folder_or_the_curves_of_a_dpo_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"-"))
    path = write_points(tmp_path / "frontier", world())
    (path.parent / "metrics.jsonl").write_text("")  # a sweep's own log beside its points
    for argument in (path, path.parent):
        main([str(argument)])
        *pictures, hint = capsys.readouterr().out.splitlines()
        assert pictures == [str(path.parent / f"frontier.{kind}") for kind in ("png", "svg")]
        assert hint.endswith(f"python -m experiments.figures {path.parent}")
        assert all((path.parent / f"frontier.{kind}").exists() for kind in ("png", "svg"))
    run = write_run(tmp_path, 3)
    main([str(run)])
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n"


def test_it_needs_neither_torch_nor_a_window(tmp_path):
    write_points(tmp_path, world())
    code = ("import sys; sys.modules['torch'] = None; import plot_frontier; "
            "plot_frontier.main(sys.argv[1:]); assert 'matplotlib.pyplot' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True,
                          cwd=Path(plot_frontier.__file__).parent)
    assert done.returncode == 0, done.stderr
