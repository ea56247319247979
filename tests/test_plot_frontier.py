"""Laws of plot_frontier.py: the hull is what mixing gives, the table finds what was put in, and the
figures show what was logged, labelled, with nothing cut off."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.container
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_points import GRID, START, P, best_reward, frontier_point, run_of, world, write_points

import plot_frontier
from plot_frontier import draw_frontier, smooth, training_curves
from points import envelope
from support.runs import UserError, main_exit, read_rows


def step_row(i: int, n: int) -> dict:
    """What a dpo run logs at step i of n, or something like it."""
    t, noise = i / max(1, n), math.sin(7.1 * i)
    chosen, rejected = -0.3 * t, -1.1 * t
    row = dict(step=i, loss=math.log(2) - 0.25 * t + 0.01 * noise * (i > 0), margin=0.8 * t,
               reward_chosen=chosen, reward_rejected=rejected, logp_chosen=-31 + noise + chosen,
               logp_rejected=-33 + noise + rejected, accuracy=0.5 + 0.3 * t, weight=0.5 - 0.15 * t)
    return row | {f"weight_{p}": 0.5 - 0.15 * t + (p - 50) / 100 * t for p in (5, 25, 50, 75, 95)}


def point(t: float, reward: bool) -> dict:
    return dict(kl=1.3 * t, kl_se=0.03 * t, reward=0.5 + 0.3 * t if reward else None,
                reward_se=0.01 if reward else None)


def write_run(folder: Path, n: int, reward: bool = True) -> tuple[Path, Path]:
    """metrics.jsonl of a run of n steps, and its groups' reference.json."""
    run, lines = folder / "toy" / "dpo", []
    run.mkdir(parents=True)
    for i in range(n):
        lines.append(step_row(i, n))
        if (i + 1) % max(1, n // 4) == 0:
            t = (i + 1) / n
            lines.append(dict(step=i, eval=point(t, reward) | dict(accuracy=0.5 + 0.3 * t)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reference = folder / "reference.json"
    reference.write_text(json.dumps(dict(point=point(0, reward), optimum=[], prompts=[])))
    return run, reference


def draw(folder: Path, n: int, reward: bool = True) -> tuple[Figure, Path]:
    """The figure of such a run, after it was written, and the path it was written to."""
    figures, savefig = [], Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        savefig(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        path = training_curves(*write_run(folder, n, reward))
    return figures[-1], path


@pytest.mark.parametrize("n, reward", [(1, True), (1, False), (2, True), (39, False), (120, True)])
def test_a_picture_is_written_whatever_the_length_of_the_run(tmp_path, n, reward):
    figure, path = draw(tmp_path, n, reward)
    assert path.name == "curves.png" and [p.name for p in path.parent.glob("*.png")] == [path.name]
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[1] >= 1200 and pixels.shape[0] >= 700, "too small to read"
    assert 0.02 < (pixels.mean(-1) < 0.95).mean() < 0.5, "blank, or all ink"
    assert len(figure.axes) == (7 if reward else 6), "r* has an axis of its own, where there is one"


@pytest.fixture(scope="module")
def figure(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("long"), 200)[0]


def test_every_panel_has_a_title_labels_with_units_and_a_legend(figure):
    for ax in figure.axes[:6]:
        assert ax.get_title() and ax.get_ylabel() and ax.get_xlabel() == "step", ax
        labels = [text.get_text() for text in ax.get_legend().get_texts()]
        assert len(labels) >= 2 and len(set(labels)) == len(labels), f"{ax.get_title()}: {labels}"
    units = "nats", "reward", "w(m)", "nats", "share", "nats", "0 to 1"
    for ax, unit in zip(figure.axes, units):
        assert unit in ax.get_ylabel(), f"{ax.get_title()!r} has no unit: {ax.get_ylabel()!r}"
    assert "toy/dpo" in figure.get_suptitle(), "which run is it?"


def test_nothing_is_cut_off_and_no_legend_hides_a_line(figure):
    renderer, page = FigureCanvasAgg(figure).get_renderer(), figure.bbox
    for ax in figure.axes:
        (x0, y0), (x1, y1) = ax.get_tightbbox(renderer).get_points()
        assert page.x0 <= x0 and x1 <= page.x1 and page.y0 <= y0 and y1 <= page.y1, \
            f"{ax.get_title() or ax.get_ylabel()!r} leaves the page"
    for ax in figure.axes[:6]:
        legend = ax.get_legend().get_window_extent(renderer)
        for other in figure.axes:
            assert not legend.overlaps(other.get_window_extent(renderer)), \
                f"the legend of {ax.get_title()!r} lies on {other.get_title()!r}"
            title = other.title.get_window_extent(renderer)
            assert not (other.get_title() and legend.overlaps(title)), "a legend on a title"


def test_lines_can_be_told_apart_in_grey(figure):
    for ax in figure.axes[:6]:
        lines = ax.get_legend().get_lines()
        styles = {(line.get_linestyle(), line.get_marker()) for line in lines}
        assert len(styles) == len(lines), f"{ax.get_title()!r}: colour alone tells lines apart"


def test_the_lines_are_what_was_logged(figure):
    logged = [step_row(i, 200) for i in range(200)]
    wanted = {(0, "training"): "loss", (1, "chosen"): "reward_chosen",
              (1, "rejected"): "reward_rejected", (2, "median"): "weight_50",
              (3, "chosen"): "logp_chosen", (3, "rejected"): "logp_rejected",
              (4, "pairs of the batch"): "accuracy"}
    for (panel, label), key in wanted.items():
        line, = [x for x in figure.axes[panel].get_lines() if x.get_label() == label]
        np.testing.assert_array_equal(line.get_xdata(), range(200))
        np.testing.assert_allclose(line.get_ydata(), smooth([row[key] for row in logged]))
    start, = [x for x in figure.axes[0].get_lines() if "π_ref" in x.get_label()]
    assert "0.6931" in start.get_label() and start.get_ydata()[0] == math.log(2)


def test_the_held_out_panel_starts_at_the_reference_and_has_error_bars(figure):
    steps = [0, 50, 100, 150, 200]
    for ax, key in ((figure.axes[5], "kl"), (figure.axes[6], "reward")):
        bars = [c for c in ax.containers if isinstance(c, matplotlib.container.ErrorbarContainer)]
        points = [point(t / 200, True) for t in steps]
        np.testing.assert_allclose(bars[0].lines[0].get_xydata(),
                                   [(t, p[key]) for t, p in zip(steps, points)])
        spans = [np.ptp(s[:, 1]) for s in bars[0].lines[2][0].get_segments()]
        np.testing.assert_allclose(spans, [2 * p[key + "_se"] for p in points], atol=1e-12)
    tested, = [x for x in figure.axes[4].get_lines() if x.get_label() == "held-out pairs"]
    assert tested.get_xdata().tolist() == steps[1:], "no accuracy was measured before training"


def test_smoothing_keeps_length_constants_and_straight_lines():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 39, 40, 41, 79, 80, 1000):
        np.testing.assert_allclose(smooth([2.5] * n), np.full(n, 2.5), rtol=1e-12)
        values = rng.normal(size=n).tolist()
        got = smooth(values)
        assert len(got) == n, f"{n} values became {len(got)}"
        assert min(values) - 1e-12 <= got.min() and got.max() <= max(values) + 1e-12
        half, line = n // 40, np.arange(n, dtype=float)
        inside = slice(half, n - half)
        np.testing.assert_allclose(smooth(line.tolist())[inside], line[inside], atol=1e-9)
        by_hand = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(n)]
        np.testing.assert_allclose(got, by_hand, atol=1e-12)


def test_rows_come_back_as_written(tmp_path):
    rows = [dict(step=0, loss=0.5), dict(step=0, eval=dict(kl=1.0, reward=None))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(tmp_path / "metrics.jsonl") == rows


def test_a_picture_that_cannot_be_written_is_a_users_error(tmp_path):
    run, reference = write_run(tmp_path, 3)
    (run / "curves.png").mkdir()
    with pytest.raises(UserError, match="cannot write .*curves.png"):
        training_curves(run, reference)
    assert not list(run.glob(".*.tmp")), "a temporary file was left behind"


def test_the_weights_are_drawn_by_one_function_for_both_figures(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_frontier, "weight_panel", lambda ax, steps: drawn.append(
        len(ax.plot([r["step"] for r in steps], label="weight")[0].get_xdata())))
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"-"))
    training_curves(*write_run(tmp_path, 3))
    pair = dict(reward_gap=0.1, weight=0.5, margin=0.2)
    plot_frontier.inspection(dict(pairs=[pair], step=3, accuracy=1.0, rank_correlation=1.0),
                             [step_row(i, 3) for i in range(3)], tmp_path / "inspect.png")
    assert drawn == [3, 3]


def test_it_needs_neither_torch_nor_a_window():
    code = "import sys, plot_frontier; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(plot_frontier.__file__).parent)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


# ------------------------------------------------------------------------------ the frontier

@pytest.mark.parametrize("lines, words", [
    (None, "there is no"), ([], "holds no point"), ([b"{", b"3"], "holds no point"),
    ([frontier_point("dpo", "beta=1", 1.0, 0.7)], "no point of sft")])
def test_a_frontier_that_cannot_be_drawn_is_one_sentence(tmp_path, capsys, lines, words):
    if lines is not None:
        write_points(tmp_path, lines)
    before = sorted(tmp_path.iterdir())
    assert main_exit(lambda: plot_frontier.main([str(tmp_path)])) == 2
    said = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("skipped")]
    assert len(said) == 1 and words in said[0] and "python train.py --stage frontier" in said[0]
    assert sorted(tmp_path.iterdir()) == before, "nothing is lost, and nothing half drawn"


def test_a_point_alone_and_a_folder_that_cannot_be_written(tmp_path, capsys):
    alone = write_points(tmp_path / "alone", world()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"-"))
        assert [p.name for p in draw_frontier(alone)] == ["frontier.png", "frontier.svg"]
        (tmp_path / "alone" / "table.md").unlink()
        (tmp_path / "alone" / "table.md").mkdir()
        with pytest.raises(UserError, match="cannot write .*table.md"):
            draw_frontier(alone)


# ------------------------------------------------------------------------------ its figures

def full_world() -> list[dict]:
    """All that one sweep may hold: every method, three seeds, temperatures, points far away."""
    points = world()
    for seed in (0, 1, 2):
        points += run_of("dpo", "beta=0.05", [1, 4, 9, 20], 0.8, seed=seed, reward_learned=0.2)
        points += run_of("plackett-luce", "beta=1", GRID[::6], 0.9, seed=seed)
        points += run_of("ppo", "target=1", GRID[:10], 0.6, seed=seed, reward_learned=1.0 + seed)
        points += run_of("ppo-gt", "target=1", GRID[:12], 0.9, seed=seed)
        points += run_of("unlikelihood", "alpha=1", GRID[::5], 0.6, seed=seed)
    for method in ("best-of-n", "best-of-n-learned"):
        points += [frontier_point(method, f"N={n}", k, START + 0.7 * (best_reward(k) - START))
                   for n in (1, 4, 64) if (k := math.log(n) - (n - 1) / n) >= 0]
    for s in (0.5, 2, 50):  # 50 is past the optimum
        points += run_of("dpo-soft", f"s/beta={s:g}", [0.3, 0.9 * min(s, 3)], 0.97)
        points += run_of("dpo-sampled", f"s/beta={s:g}", [0.3, 0.8 * min(s, 3)], 0.9)
    for method, setting, step in ("sft", "", 0), ("dpo", "beta=1", 350), ("ppo", "target=3", 350):
        points += [frontier_point(method, setting, 1.0, 0.6, step=step, temperature=t,
                                  win=0.6 + t / 9) for t in (0, 0.25, 0.5, 0.75)]
    return [p | dict(win=0.7) if p["step"] == 350 and p["win"] is None else p for p in points]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """name -> figure, as saved, and the folder that they were written to."""
    figures, savefig, folder = {}, Figure.savefig, tmp_path_factory.mktemp("full")

    def keep(self, file, **look):
        figures[Path(file.name).name.split(".")[1]] = self
        savefig(self, file, **look)

    path = write_points(folder, full_world())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", keep)
        pictures = draw_frontier(path)
    names = ["frontier.png", "temperature.png", "overoptimisation.png", "dial.png", "frontier.svg"]
    assert [p.name for p in pictures] == names and all(p.exists() for p in pictures)
    return figures, folder


def labels(figure) -> list[str]:
    legends = figure.legends or [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_every_figure_of_the_frontier_has_labels_units_a_legend_and_a_caption(drawn):
    figures, folder = drawn
    assert set(figures) == {"frontier", "temperature", "overoptimisation", "dial"}
    for name, figure in figures.items():
        for ax in figure.axes:
            assert ax.get_ylabel() and (ax.get_xlabel() or ax in figure.axes[2:]), name
        for words in ("Preset toy", "0.19M parameters", "seeds 0, 1, 2", "60 test prompts"):
            assert words in figure.get_supxlabel().replace("\n", " "), f"{name}: no {words!r}"
        assert labels(figure), name
        figure.draw_without_rendering()  # laid out again: it was saved at other dots per inch
        renderer, page = FigureCanvasAgg(figure).get_renderer(), figure.bbox.padded(1)
        for part in (*figure.axes, *figure.legends, figure._supxlabel):
            (x0, y0), (x1, y1) = part.get_tightbbox(renderer).get_points()
            assert page.x0 <= x0 and x1 <= page.x1 and page.y0 <= y0 and y1 <= page.y1, \
                f"{name}: {part} leaves the page"
        for legend in figure.legends:
            box = legend.get_window_extent(renderer)
            for ax in figure.axes:
                assert not box.overlaps(ax.get_window_extent(renderer)), f"{name}: legend on plot"
    assert all("nats" in figures[n].axes[0].get_xlabel() for n in figures if n != "temperature")
    pixels = matplotlib.image.imread(folder / "frontier.png")[..., :3]
    assert pixels.shape[1] >= 1200 and 0.02 < (pixels.mean(-1) < 0.95).mean() < 0.6
    assert (folder / "frontier.svg").read_text().lstrip().startswith("<?xml")


def test_the_frontier_has_one_line_a_series_on_its_envelope(drawn):
    ax, points = drawn[0]["frontier"].axes[0], full_world()
    lines = {x.get_label(): x for x in ax.get_lines() if x.get_label()[0] != "_"}
    names = [x for x in labels(drawn[0]["frontier"]) if "above" not in x]
    assert len(names) == len(set(names)) == 1 + 9, names
    series = {name: lines[name] for name in names if name in lines and name != "optimum, Eq. 4"}
    assert len(series) == 8
    looks = [(str(x.get_linestyle()), x._unscaled_dash_pattern) for x in series.values()]
    assert len(set(map(str, looks))) == 8 and len({x.get_marker() for x in series.values()}) == 8
    bound = lines["optimum, Eq. 4"]
    assert bound.get_linewidth() > max(x.get_linewidth() for x in series.values())
    np.testing.assert_allclose(bound.get_ydata(), best_reward(GRID))
    mine = [p for p in points if p["method"] == "dpo" and p["temperature"] == 1]
    kl, reward = np.array([(p["kl"], p["reward"]) for p in mine]).T
    x, y = series["DPO"].get_data()
    np.testing.assert_allclose(y, envelope(kl, reward, x, START), atol=1e-9)
    assert x[0] == 0 and y[0] == START and x[-1] == ax.get_xlim()[1] == 5
    assert "not shown: 6 of DPO." in drawn[0]["frontier"].get_supxlabel().replace("\n", " ")
    bars = [c for c in ax.containers if isinstance(c, matplotlib.container.ErrorbarContainer)]
    assert len(bars) == 9 and all(c.has_xerr and c.has_yerr for c in bars)
    sideways, upright = bars[-1].lines[2]
    np.testing.assert_allclose([np.ptp(sideways.get_segments()[0][:, 0]),
                                np.ptp(upright.get_segments()[0][:, 1])], [0.04, 0.02])
    shown = sum(p["method"] not in ("optimum", "dpo-soft", "dpo-sampled") and p["temperature"] == 1
                for p in points)
    assert sum(len(c.lines[0].get_xdata()) for c in bars) == shown, "a point is not drawn"


def test_series_can_be_told_apart_in_grey():
    def lightness(colour):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        y = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (
            0.2126, 0.7152, 0.0722)
        return 116 * np.cbrt(y) - 16  # L* of CIE 1976, 0 to 100

    grey = sorted(lightness(look[1]) for m, look in plot_frontier.SERIES.items()
                  if m not in ("sft", "dpo-soft", "dpo-sampled"))
    assert np.diff(grey).min() > 5 and grey[-1] < 80, f"L* {np.round(grey)}"


def test_win_rates_are_drawn_for_what_was_sampled_at_other_temperatures(drawn):
    figure = drawn[0]["temperature"]
    assert labels(figure) == ["SFT = π_ref", "DPO, beta=1", "PPO, learned reward, target=3"]
    for bars, last in zip(figure.axes[0].containers, (0.5, 0.7, 0.7)):
        at, win = bars.lines[0].get_data()
        np.testing.assert_allclose(at, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(win, [0.6, 0.6 + 0.25 / 9, 0.6 + 0.5 / 9, 0.6 + 0.75 / 9, last])
        half = [np.ptp(s[:, 1]) / 2 for s in bars.lines[2][0].get_segments()]
        np.testing.assert_allclose(half, np.sqrt(win * (1 - win) / P))
    assert plot_frontier.temperature(world()) is None, "no other temperature, no figure"


def test_trained_and_true_reward_are_drawn_apart(drawn):
    left, right, learned, implicit = drawn[0]["overoptimisation"].axes
    true, = [x for x in left.get_lines() if x.get_label() == "target=1"]
    x = np.sqrt([0, *GRID[:10]])
    np.testing.assert_allclose(true.get_xdata(), x)
    np.testing.assert_allclose(true.get_ydata(), START + 0.6 * (best_reward(x**2) - START))
    np.testing.assert_allclose(learned.get_lines()[0].get_ydata(), [0] + [2.0] * 10)  # seeds' mean
    np.testing.assert_allclose(implicit.get_lines()[0].get_ydata(), [0] + [0.2] * 4)
    assert "learned" in learned.get_ylabel() and "implicit" in implicit.get_ylabel()
    assert {"target=1", "beta=0.05", "true (left)", "trained by (right)"} <= set(
        labels(drawn[0]["overoptimisation"]))
    assert plot_frontier.overoptimisation(world()) is None


def test_the_dial_joins_what_was_reached_to_its_optimum(drawn):
    figure, ax = drawn[0]["dial"], drawn[0]["dial"].axes[0]
    rings, = [x for x in ax.get_lines() if x.get_label() == "the optimum at that s/β"]
    np.testing.assert_allclose(rings.get_xydata(), [(k, best_reward(k)) for k in (0.5, 2)])
    assert rings.get_markerfacecolor() == "none"
    joins = [x.get_xydata() for x in ax.get_lines() if len(x.get_xdata()) == 2 and x != rings
             and x.get_marker() == "None"]
    np.testing.assert_allclose(sorted(j[0][0] for j in joins), [0.4, 0.45, 1.6, 1.8])
    assert sorted({j[1][0] for j in joins}) == [0.5, 2]
    texts = [t.get_text() for t in ax.texts]
    assert sorted(texts) == ["0.5", "0.5", "2", "2", "50", "50", "β = 1"]
    caption = figure.get_supxlabel().replace("\n", " ")
    assert "No ring at 50" in caption and "Past KL 5 and not shown: 1." in caption
    assert plot_frontier.dial(world()) is None, "no soft or sampled labels, no figure"


def test_the_same_points_give_the_same_svg(drawn, tmp_path):
    path = write_points(tmp_path, full_world())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("temperature", "overoptimisation", "dial"):
            patch.setattr(plot_frontier, name, lambda points: None)
        draw_frontier(path)
    assert (tmp_path / "frontier.svg").read_bytes() == (drawn[1] / "frontier.svg").read_bytes()


def test_main_draws_a_file_a_folder_or_the_curves_of_a_dpo_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"-"))
    path = write_points(tmp_path / "frontier", world())
    for argument in (path, path.parent):
        plot_frontier.main([str(argument)])
        out = capsys.readouterr().out
        table_md = (path.parent / "table.md").read_text()
        assert out.startswith(table_md) and out.endswith(
            f"{path.parent / 'frontier.png'}\n{path.parent / 'frontier.svg'}\n")
    run, reference = write_run(tmp_path, 3)
    plot_frontier.main([str(run), "--groups", str(reference.parent)])
    assert capsys.readouterr().out == f"{run / 'curves.png'}\n"
    (path.parent / "metrics.jsonl").write_text("")  # a sweep's own log beside its points
    plot_frontier.main([str(path.parent)])
    assert "frontier.svg" in capsys.readouterr().out
