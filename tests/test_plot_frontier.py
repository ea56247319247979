"""Laws of plot_frontier.py: the figure shows what was logged, labelled, and nothing is cut off."""

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

import plot_frontier
from plot_frontier import read_rows, smooth, training_curves
from runs import UserError


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


def test_it_needs_neither_torch_nor_a_window():
    code = "import sys, plot_frontier; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(plot_frontier.__file__).parent)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
