"""Laws of experiments/figures.py: the figures show what was measured, labelled, with nothing cut
off, and one call draws all that a frontier.jsonl allows."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_plot_frontier import (GRID, START, P, assert_nothing_is_cut_off, best_reward,
                                errorbars_of, full_world, labels, line_of, saved_by, step_row,
                                world, write_points)

from experiments.figures import (degeneration, dial, draw_all, inspection, main, online,
                                 overoptimisation, temperature)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {draw.__name__: draw(full_world()) for draw in (temperature, dial, online)}


@pytest.mark.parametrize("name", ["temperature", "dial", "online"])
def test_every_figure_has_labels_a_legend_and_a_caption_and_nothing_is_cut_off(drawn, name):
    figure = drawn[name]
    for ax in figure.axes:
        assert ax.get_ylabel() and (ax.get_xlabel() or ax in figure.axes[2:]), name
    for words in ("Preset toy", "0.19M parameters", "seeds 0, 1, 2", "60 test prompts"):
        assert words in figure.get_supxlabel().replace("\n", " ")
    assert labels(figure) and ("nats" in figure.axes[0].get_xlabel() or name == "temperature")
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("draw", [temperature, dial, online])
def test_a_figure_that_has_nothing_to_show_is_not_drawn(draw):
    assert draw(world()) is None


def test_win_rates_are_drawn_for_what_was_sampled_at_other_temperatures(drawn):
    figure = drawn["temperature"]
    assert labels(figure) == ["SFT = π_ref", "DPO, beta=1", "PPO, learned reward, target=3"]
    for bars, last in zip(errorbars_of(figure.axes[0]), (0.5, 0.7, 0.7)):
        at, win = bars.lines[0].get_data()
        np.testing.assert_allclose(at, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(win, [0.6, 0.6 + 0.25 / 9, 0.6 + 0.5 / 9, 0.6 + 0.75 / 9, last])
        half = [np.ptp(s[:, 1]) / 2 for s in bars.lines[2][0].get_segments()]
        np.testing.assert_allclose(half, np.sqrt(win * (1 - win) / P))


def test_online_dpo_is_drawn_beside_dpo_with_one_line_each(drawn):
    ax = drawn["online"].axes[0]
    for label, share in (("online DPO, labels by r*", 0.98),
                         ("online DPO, labels by its own r̂", 0.85)):
        x, y = line_of(ax, label).get_data()
        wanted = START + share * (best_reward(x) - START)
        on = np.isin(x, GRID)
        np.testing.assert_allclose(y[on], wanted[on], atol=1e-9)
    assert "optimum, Eq. 4" in labels(drawn["online"]) and line_of(ax, "DPO")


def test_overoptimisation_shows_both_rewards_and_the_plane(tmp_path):
    rows = [dict(run=run, step=step, reward=0.5 + 0.001 * step * sign, reward_se=0.01,
                 implicit=0.1 * step, kl=0.02 * step, grammatical=None, accuracy=0.8)
            for run, sign in (("60 prompts", -1), ("all", 1)) for step in (0, 50, 100)]
    optimum = [dict(kl=kl, reward=best_reward(kl), ess=4 - kl) for kl in (0.0, 0.5, 2.0)]
    figure = saved_by(lambda: overoptimisation(rows, optimum, tmp_path / "o.png"))
    true, implicit, plane = figure.axes
    assert labels(figure) == ["60 prompts", "all", "optimum, Eq. 4"]
    np.testing.assert_allclose(implicit.get_lines()[0].get_ydata(), [0, 5, 10])
    np.testing.assert_allclose(plane.get_lines()[1].get_xydata(), [(0, 0.5), (1, 0.55), (2, 0.6)])
    np.testing.assert_allclose(plane.get_lines()[2].get_xdata(), [0, 0.5])  # the reliable ones
    assert "r*" in true.get_ylabel() and "r̂" in implicit.get_ylabel()
    assert "KL" in plane.get_xlabel()
    assert_nothing_is_cut_off(figure, legends_beside=False)
    bare = saved_by(lambda: overoptimisation(rows, [], tmp_path / "o.png"))
    assert labels(bare) == ["60 prompts", "all"], "no reliable optimum"


def test_the_dial_joins_what_was_reached_to_its_optimum(drawn):
    ax = drawn["dial"].axes[0]
    rings = line_of(ax, "the optimum at that s/β")
    np.testing.assert_allclose(rings.get_xydata(), [(k, best_reward(k)) for k in (0.5, 2)])
    assert rings.get_markerfacecolor() == "none"
    joins = [x.get_xydata() for x in ax.get_lines() if len(x.get_xdata()) == 2 and x != rings
             and x.get_marker() == "None"]
    np.testing.assert_allclose(sorted((j[0][0], j[1][0]) for j in joins),
                               [(0.4, 0.5), (0.45, 0.5), (1.6, 2), (1.8, 2)])
    texts = [t.get_text() for t in ax.texts]
    assert sorted(texts) == ["0.5", "0.5", "2", "2", "50", "50", "β = 1"]
    text = drawn["dial"].get_supxlabel().replace("\n", " ")
    assert "No ring at 50" in text and "Past KL 5 and not shown: 1." in text


def test_degeneration_shows_both_weights_and_says_what_is_not_defined(tmp_path):
    keys = "kl ref_ppl logp_chosen logp_rejected repetition eos reward".split()
    rows = [dict(weight=weight, step=step, grammatical=None,
                 **{key: (i + 2) * (step + sign) for i, key in enumerate(keys)})
            for weight, sign in (("sigmoid", 1), ("constant", 9), ("reference-free", 5))
            for step in (0, 50, 100)]
    older = saved_by(lambda: degeneration(rows[:6], tmp_path / "older.png"))
    assert labels(older) == ["DPO: w = σ(-m)", "w = 1"], "a file without the third run"
    figure = saved_by(lambda: degeneration(rows, tmp_path / "degenerate.png"))
    assert labels(figure) == ["DPO: w = σ(-m)", "w = 1", "no π_ref in the loss"]
    empty = figure.axes[6]
    assert empty.texts[0].get_text() == "not defined on this corpus"
    for key, ax in zip(keys, [ax for ax in figure.axes if ax is not empty]):
        for label, weight in (("DPO: w = σ(-m)", "sigmoid"), ("w = 1", "constant"),
                              ("no π_ref in the loss", "reference-free")):
            np.testing.assert_array_equal(line_of(ax, label).get_xydata(), [
                (r["step"], r[key]) for r in rows if r["weight"] == weight])
        assert ax.get_xlabel() == "step" and ax.get_ylabel(), key
    assert_nothing_is_cut_off(figure)


def test_sec4_inspection_shows_each_pair_and_marks_those_in_the_wrong_order(tmp_path):
    pairs = [dict(reward_gap=0.1 * i, margin=m, weight=1 / (1 + np.exp(m)))
             for i, m in enumerate((2.0, -1.0, 0.5, -0.2), 1)]
    inspected = dict(pairs=pairs, step=30, accuracy=0.51, rank_correlation=0.42,
                     learned=dict(accuracy=0.61, rank_correlation=0.52))
    metrics = [step_row(i, 30) for i in range(30)] + [dict(step=29, eval={})]
    figure = saved_by(lambda: inspection(inspected, metrics, tmp_path / "inspect.png"))
    training, weights, margins = figure.axes
    assert len(line_of(training, "median").get_xdata()) == 30, "an evaluation is no step"
    for ax, key in ((weights, "weight"), (margins, "margin")):
        for label, some in (("in the order of r*", pairs[::2]),
                            ("in the wrong order", pairs[1::2])):
            np.testing.assert_allclose(line_of(ax, label).get_xydata(),
                                       [(p["reward_gap"], p[key]) for p in some])
        assert "reward gap" in ax.get_xlabel() and ax.get_ylabel()
    for words in ("r̂: accuracy 0.510, rank correlation 0.420", "r_φ: accuracy 0.610"):
        assert words in margins.get_title()
    assert_nothing_is_cut_off(figure, legends_beside=False)


def test_one_command_draws_all_that_the_points_allow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"-"))
    names = ["frontier.png", "temperature.png", "dial.png", "online.png", "frontier.svg"]
    for points, wanted in ((full_world(), names), (world()[:1], [names[0], names[-1]])):
        path = write_points(tmp_path / str(len(wanted)), points)
        main([str(path.parent)])
        out, table_md = capsys.readouterr().out, (path.parent / "table.md").read_text()
        pictures = [path.parent / name for name in wanted]
        assert out == table_md + "\n" + "".join(f"{p}\n" for p in pictures)
        assert set(path.parent.iterdir()) == {path, path.parent / "table.md", *pictures}
    assert draw_all(path) == pictures, "the file itself will do in place of its folder"
