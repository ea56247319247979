"""Laws of support/curves.py: the training curves show the logged numbers, have labels, and nothing
in them is cut off."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
from test_plot_frontier import (BETA, assert_nothing_is_cut_off, best_reward, errorbars_of,
                                evaluation, line_of, saved_by, step_row, write_run)

from support.curves import smooth, training_curves
from support.runs import UserError


@pytest.mark.parametrize("n, reward", [(1, True), (39, False)])
def test_curves_are_drawn_for_a_run_of_any_length(tmp_path, n, reward):
    run = write_run(tmp_path, n, reward=reward)
    figure = saved_by(lambda: training_curves(run))
    training_curves(run)
    pixels = matplotlib.image.imread(run / "curves.png")[..., :3]
    assert pixels.shape[1] >= 1200 and pixels.shape[0] >= 700, "the picture is too small to read"
    assert 0.02 < (pixels.mean(-1) < 0.95).mean() < 0.5, "the picture is blank or full"
    way = figure.axes[0]
    assert ("KL" in way.get_xlabel()) == reward and ("KL" in way.get_ylabel()) != reward
    assert ("reward" in figure.get_suptitle()) == reward


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("long"), 200)
    return saved_by(lambda: training_curves(run))


def test_every_panel_has_a_title_units_and_a_legend_and_nothing_is_cut_off(curves):
    for ax in curves.axes:
        assert ax.get_title() and (ax.get_xlabel() == "step" or ax is curves.axes[0]), ax
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert len(names) >= 2 and len(set(names)) == len(names), f"{ax.get_title()}: {names}"
        looks = {(x.get_linestyle(), x.get_marker()) for x in ax.get_legend().get_lines()}
        assert len(looks) == len(ax.get_legend().get_lines()), "two lines differ in colour alone"
    units = "0 to 1", "nats per pair", "nats", "w(m)", "share"
    for ax, unit in zip(curves.axes, units, strict=True):
        assert unit in ax.get_ylabel(), f"{ax.get_title()!r} has no unit: {ax.get_ylabel()!r}"
    assert curves.get_suptitle() == "DPO, β 0.5: reward 0.500 → 0.800 at KL 1.3 nats"
    assert curves.get_supxlabel().startswith("toy/dpo; "), "which folder is it?"
    assert_nothing_is_cut_off(curves)


def test_the_lines_are_what_was_logged_and_the_titles_say_where_they_begin_and_end(curves):
    logged = [step_row(i, 200) for i in range(200)]
    wanted = {(1, "training"): "loss", (2, "gap"): "margin", (2, "chosen"): "reward_chosen",
              (2, "rejected"): "reward_rejected", (3, "median"): "weight_50",
              (4, "pairs of the batch"): "accuracy"}
    for (panel, label), key in wanted.items():
        line = line_of(curves.axes[panel], label)
        values = smooth([row[key] for row in logged]) / (BETA if panel == 2 else 1)
        np.testing.assert_array_equal(line.get_xdata(), range(200))
        np.testing.assert_allclose(line.get_ydata(), values)
        title = curves.axes[panel].get_title()
        assert (f"{label} {values[-1]:.3g}" if panel == 2 else
                f": {values[0]:.3g} → {values[-1]:.3g}") in title
    for label, key in (("5 to 95 % of pairs", "weight_95"), ("25 to 75 % of pairs", "weight_75")):
        band, = [c for c in curves.axes[3].collections if c.get_label() == label]
        assert band.get_paths()[0].vertices[:, 1].max() == max(smooth([r[key] for r in logged]))


@pytest.mark.parametrize("loss, first, text", [
    ("pairwise", math.log(2), "0.6931 = log 2"), ("pairwise", -1e-7, "0"),
    ("plackett-luce", math.log(24), "3.1781 = log K!"), ("preferred-ft", 26.1867, "26.1867"),
    ("reference-free", 11.5, "11.5"), ("unlikelihood", math.log(2), "0.6931")])
def test_the_first_loss_is_named_only_if_it_equals_its_known_value(tmp_path, loss, first, text):
    """Where π = π_ref, Eq. 7 is log 2 and Plackett-Luce is log K!. Other losses have no known first
    value. Without π_ref in the loss, r̂/β is log π itself."""
    run = write_run(tmp_path, 4, loss=loss)
    path = run / "metrics.jsonl"
    rows = path.read_text().replace(f'"loss": {math.log(2)}', f'"loss": {first}', 1)
    path.write_text(rows)
    figure = saved_by(lambda: training_curves(run))
    start, = [x for x in figure.axes[1].get_lines() if "π_ref" in x.get_label()]
    assert start.get_label() == f"first step, π = π_ref: {text}" and start.get_ydata()[0] == first
    assert ("log π_ref" in figure.axes[2].get_ylabel()) == (loss != "reference-free")


def test_the_panel_of_reward_against_kl_has_error_bars_and_the_optimum(curves):
    steps = [0, 50, 100, 150, 200]
    points, way = [evaluation(t / 200, True) for t in steps], curves.axes[0]
    bars = errorbars_of(way)[0]
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [(p["kl"], p["reward"]) for p in points])
    assert bars.lines[0].get_linestyle() == "-", "the points are joined in the order of steps"
    for axis, key, lines in zip((0, 1), ("kl_se", "reward_se"), bars.lines[2]):
        spans = [np.ptp(s[:, axis]) for s in lines.get_segments()]
        np.testing.assert_allclose(spans, [2 * p[key] for p in points], atol=1e-12)
    best = line_of(way, "optimum, Eq. 4").get_xydata()
    np.testing.assert_allclose(best, [(kl, best_reward(kl)) for kl in (0.5, 1.0)])
    assert [text.get_text() for text in way.texts] == ["step 200"]
    held_out = line_of(curves.axes[4], "held-out pairs")
    assert held_out.get_xdata().tolist() == steps[1:], "no accuracy was measured before training"


def test_a_large_kl_has_a_logarithmic_axis_on_which_0_can_be_drawn(tmp_path, curves):
    run = write_run(tmp_path, 4)
    rows = (run / "metrics.jsonl").read_text().replace('"kl": 1.3', '"kl": 130')
    (run / "metrics.jsonl").write_text(rows)
    way = saved_by(lambda: training_curves(run)).axes[0]
    assert (way.get_xscale(), curves.axes[0].get_xscale()) == ("symlog", "linear")
    assert way.get_xlim()[0] <= 0 and way.get_xlim()[1] > 130


def test_a_folder_and_a_title_may_have_any_name(tmp_path):
    """matplotlib would read $ as a formula, and cannot draw what is not UTF-8. A long name is not
    cut."""
    for name, title in (("$\\frac{$", "$\\frac{$"), ("a\nb\udcff", "a_b_"), ("my 1.5", "my 1.5"),
                        ("x" * 200, "x" * 200)):
        run = write_run(tmp_path / name[:9], 2, f"DPO, weight $w$.py:{name}")
        figure = saved_by(lambda: training_curves(run.rename(run.parent / name)))
        caption, above = ("".join(text.split()) for text in (
            figure.get_supxlabel(), figure.get_suptitle()))
        title = title.replace(" ", "")
        assert f"/{title};lines" in caption and f"weight$w$.py:{title}:reward" in above
        figure.draw_without_rendering()


def test_a_damaged_config_is_one_sentence(tmp_path):
    run = write_run(tmp_path, 2)
    good = json.loads((run / "config.json").read_text())
    settings = [good["settings"] | {key: x} for key in ("beta", "num_completions")
                for x in ("1", 0, -1, None, math.inf)]
    for config in (5, {}, dict(settings={}), good | dict(settings={}), good | dict(parents={}),
                   good | dict(about=5), *(good | dict(settings=x) for x in settings)):
        (run / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="config.json is damaged"):
            training_curves(run)
    (run / "config.json").write_text(json.dumps(good | dict(parents=dict(groups="x"))))
    with pytest.raises(UserError, match="no folder .* holds the groups of this run"):
        training_curves(run)


def test_a_long_list_of_settings_stands_below_the_figure(tmp_path):
    many = ", ".join(f"setting_{i} reference-free" for i in range(20))
    run = write_run(tmp_path, 40, f"DPO, β 0.5; {many}")
    figure = saved_by(lambda: training_curves(run))
    assert figure.get_suptitle() == "DPO, β 0.5: reward 0.500 → 0.800 at KL 1.3 nats"
    assert f"toy/dpo; {many}; lines" in figure.get_supxlabel().replace("\n", " ")
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("stage, target", [("ppo", 2.0), ("ppo-gt", 0.0)])
def test_ppo_has_curves_with_its_reward_kl_and_beta(tmp_path, stage, target):
    run = write_run(tmp_path, 40)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | dict(
        about=dict(stage=stage), settings=dict(ppo_target=target))))
    rows = [dict(step=i, kl=0.1 * i, reward=2.0 * i, beta=1 + i, clip_fraction=0.01 * i,
                 explained_variance=0.02 * i, entropy=1.2) for i in range(20)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [
        *rows, dict(step=19, eval=evaluation(1, True))]))
    figure = saved_by(lambda: training_curves(run))
    assert figure.get_suptitle().startswith("dpo: reward 0.500"), "no title: the folder's name"
    assert figure.axes[1].get_ylabel() == {"ppo": "mean r_φ", "ppo-gt": "mean r*"}[stage]
    way, reward, kl, shares, beta = figure.axes
    np.testing.assert_allclose(errorbars_of(way)[0].lines[0].get_xydata(), [(0, 0.5), (1.3, 0.8)])
    for ax, label, key in ((reward, "rollouts", "reward"), (kl, "rollouts", "kl"),
                           (shares, "explained variance", "explained_variance"),
                           (shares, "clipped", "clip_fraction"), (beta, "β", "beta")):
        np.testing.assert_allclose(line_of(ax, label).get_ydata(), [row[key] for row in rows])
        assert ax.get_title() and ax.get_ylabel() and ax.get_xlabel() == "step"
    assert [x.get_ydata()[0] for x in kl.get_lines()[1:]] == [target] * bool(target)
    assert_nothing_is_cut_off(figure)
    assert (run / "curves.png").exists()


def test_smoothing_is_a_running_mean_that_keeps_the_length():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 10, 39, 40, 41, 79, 80, 1000):
        values, half = rng.normal(size=n).tolist(), n // 40
        by_hand = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(n)]
        np.testing.assert_allclose(smooth(values), by_hand, atol=1e-12)
