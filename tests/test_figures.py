"""Laws of experiments/figures.py: the figures show the measured numbers, have labels, and nothing
in them is cut off. One call draws every figure that a frontier.jsonl allows."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_plot_frontier import (GRID, START, P, assert_nothing_is_cut_off, best_reward,
                                errorbars_of, full_world, labels, line_of, saved_by, step_row,
                                world, write_points)

from experiments.figures import (degeneration, dial, draw_all, inspection, main, online,
                                 overoptimisation, temperature, times_dpo)


@pytest.fixture(scope="module")
def drawn() -> dict[str, Figure]:
    return {draw.__name__: draw(full_world()) for draw in (temperature, dial, online)}


@pytest.mark.parametrize("name", ["temperature", "dial", "online"])
def test_every_figure_has_labels_a_legend_and_a_caption_and_nothing_is_cut_off(drawn, name):
    figure = drawn[name]
    for ax in figure.axes:
        assert ax.get_ylabel() and (ax.get_xlabel() or ax in figure.axes[2:]), name
    seeds = "Seeds: 0." if name == "temperature" else "0, 1, 2"
    for words in ("Preset toy", "0.19M parameters", seeds, "60 test prompts"):
        assert words in figure.get_supxlabel().replace("\n", " ")
    assert all(ax.get_title() for ax in figure.axes)
    assert labels(figure) and ("nats" in figure.axes[0].get_xlabel() or name == "temperature")
    assert_nothing_is_cut_off(figure)


@pytest.mark.parametrize("draw", [temperature, dial, online])
def test_a_figure_without_data_is_not_drawn(draw):
    assert draw(world()) is None


def test_win_rates_are_drawn_for_policies_sampled_at_several_temperatures(drawn):
    figure = drawn["temperature"]
    ax = figure.axes[0]
    assert labels(figure)[2:] == ["SFT = π_ref", "DPO, beta=1", "PPO (learned reward), target=3"]
    assert line_of(ax, "temperature 1").get_xdata()[0] == 1
    assert line_of(ax, "as good as π_ref at temperature 1").get_ydata()[0] == 0.5
    for bars, last in zip(errorbars_of(ax), (0.5, 0.7, 0.7)):
        at, win = bars.lines[0].get_data()
        np.testing.assert_allclose(at, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(win, [0.6, 0.6 + 0.25 / 9, 0.6 + 0.5 / 9, 0.6 + 0.75 / 9, last])
        half = [np.ptp(s[:, 1]) / 2 for s in bars.lines[2][0].get_segments()]
        error = np.sqrt(win * (1 - win) / P)
        error[-1] *= last != 0.5  # π_ref against itself: not measured
        np.testing.assert_allclose(half, error)


def test_online_dpo_is_drawn_beside_dpo_with_one_line_each(drawn):
    ax = drawn["online"].axes[0]
    for label, share in (("online DPO (labels by r*)", 0.98),
                         ("online DPO (labels by its own r̂)", 0.85)):
        x, y = line_of(ax, label).get_data()
        wanted = START + share * (best_reward(x) - START)
        on = np.isin(x, GRID)
        np.testing.assert_allclose(y[on], wanted[on], atol=1e-9)
    assert "optimum, Eq. 4" in labels(drawn["online"]) and line_of(ax, "DPO")


def test_overoptimisation_shows_both_rewards_and_reward_against_kl(tmp_path):
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
    assert "KL" in plane.get_xlabel() and "Over-optimisation" in figure.get_suptitle()
    assert_nothing_is_cut_off(figure)
    bare = saved_by(lambda: overoptimisation(rows, [], tmp_path / "o.png"))
    assert labels(bare) == ["60 prompts", "all"], "no reliable optimum"


def test_the_dial_joins_each_last_point_to_its_optimum(drawn):
    ax = drawn["dial"].axes[0]
    rings = line_of(ax, "the optimum at that s/β")
    np.testing.assert_allclose(rings.get_xydata(), [(k, best_reward(k)) for k in (0.5, 2)])
    assert rings.get_markerfacecolor() == "none"
    joins = [x.get_xydata() for x in ax.get_lines() if len(x.get_xdata()) == 2 and x != rings
             and x.get_marker() == "None"]
    np.testing.assert_allclose(sorted((j[0][0], j[1][0]) for j in joins),
                               [(0.4, 0.5), (0.45, 0.5), (1.6, 2), (1.8, 2)])
    texts = [t.get_text() for t in ax.texts]
    assert sorted(texts) == ["s/β = 0.5", "s/β = 2", *["s/β = 50"] * 2, "β = 0.05", "β = 1"]
    assert "No ring at s/β 50" in drawn["dial"].get_supxlabel().replace("\n", " ")
    drawn["dial"].draw_without_rendering()
    frame = ax.get_window_extent()
    for text in ax.texts:
        assert frame.containsx(text.get_window_extent().x1), f"{text} leaves the frame"
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    for x, y in (xy for line in ax.get_lines() for xy in line.get_xydata()):
        assert left < x < right and low < y < high, "a line leaves the frame"


def degeneration_rows(weights, seeds) -> list[dict]:
    keys = "kl ref_ppl logp_chosen logp_rejected repetition eos reward grammatical".split()
    return [dict(weight=weight, seed=seed, step=step,
                 **{key: (i + 2) * (step + 10 * n + seed + 1) for i, key in enumerate(keys)})
            for n, weight in enumerate(weights) for seed in seeds for step in (0, 50, 100)]


def test_degeneration_shows_each_loss_on_each_seed_with_a_sample(tmp_path):
    names = {"sigmoid": "DPO", "constant": "w = 1", "reference-free": "no π_ref",
             "my dir/$w.py:mine": "w = mine"}
    rows = degeneration_rows(names, (0, 1, 2))
    texts = ["prompt:  The $film$", "π_ref:   is", *(f"{name}: r* 0.5 |is " + "very " * 200
                                                     for name in names.values())]
    figure = saved_by(lambda: degeneration(rows, texts, tmp_path / "degenerate.png"))
    *panels, strip = figure.axes
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == [*names.values()]
    for ax, key in zip(panels, ("ref_ppl", "grammatical", "logp_chosen", "reward"), strict=True):
        for weight, label in names.items():
            lines = [x.get_xydata() for x in ax.get_lines() if x.get_label() == label]
            np.testing.assert_array_equal(lines, [[(r["step"], r[key]) for r in rows if (
                r["weight"], r["seed"]) == (weight, seed)] for seed in (0, 1, 2)])
        assert ax.get_title() and ax.get_xlabel() == "step" and ax.get_ylabel(), key
    colours = {x.get_label(): x.get_color() for x in panels[0].get_lines()}
    for text, wanted in zip(strip.texts, texts, strict=True):
        assert wanted.startswith(text.get_text()[:40]), "the samples stand below"
        label = wanted.partition(":")[0]
        assert text.get_color() == colours.get(label, "k"), "a sample has its line's colour"
    assert len({*colours.values()}) == 4
    ends = [times_dpo(rows, "constant", key) for key in ("kl", "ref_ppl")]
    assert ends == ["1.1"] * 2 and figure.get_suptitle().count("1.1 times") == 2
    assert "3 seeds" in figure.get_suptitle()
    assert_nothing_is_cut_off(figure, legends_beside=False)


def test_degeneration_without_a_true_reward_shows_four_other_measures(tmp_path):
    rows = [row | dict(reward=None, grammatical=None)
            for row in degeneration_rows(["sigmoid", "constant"], [0])]
    figure = saved_by(lambda: degeneration(rows, ["prompt: x"], tmp_path / "degenerate.png"))
    assert [ax.get_title() for ax in figure.axes[:4]] == [
        "Perplexity of the samples", "Log-prob of chosen completions", "Repeated trigrams",
        "Samples that end"]
    assert "(1 seed)" in figure.get_suptitle()


def test_the_ratio_to_dpo_is_given_as_a_range_over_the_seeds():
    rows = [dict(weight=weight, seed=seed, step=step, kl=kl * step) for weight, seed, kl in (
        ("sigmoid", 0, 2), ("sigmoid", 1, 4), ("constant", 0, 3), ("constant", 1, 12_000),
        ("reference-free", 0, 3), ("reference-free", 1, 6)) for step in (0, 10)]
    assert times_dpo(rows, "constant", "kl") == "1.5 to 3,000"
    assert times_dpo(rows, "reference-free", "kl") == "1.5"


def test_sec4_inspection_shows_each_pair_and_marks_those_in_the_wrong_order(tmp_path):
    pairs = [dict(reward_gap=0.1 * i, margin=m, weight=1 / (1 + np.exp(m)))
             for i, m in enumerate((2.0, -1.0, 0.5, -0.2), 1)]
    inspected = dict(pairs=pairs, step=30, accuracy=0.51, rank_correlation=0.42,
                     learned=dict(accuracy=0.61, rank_correlation=0.52))
    metrics = [step_row(i, 30) for i in range(30)] + [dict(step=29, eval={})]
    figure = saved_by(lambda: inspection(inspected, metrics, tmp_path / "inspect.png"))
    training, weights, margins = figure.axes
    assert len(line_of(training, "median").get_xdata()) == 30, "an evaluation is not a step"
    for ax, key in ((weights, "weight"), (margins, "margin")):
        for label, some in (("right order, m > 0", pairs[::2]),
                            ("wrong order, m < 0", pairs[1::2])):
            np.testing.assert_allclose(line_of(ax, label).get_xydata(),
                                       [(p["reward_gap"], p[key]) for p in some])
        assert "reward gap" in ax.get_xlabel() and ax.get_ylabel()
    for ax, label, level in ((training, "1/2 = σ(0), as at π_ref", 0.5),
                             (weights, "1/2 = σ(0)", 0.5), (margins, "m = 0, as at π_ref", 0)):
        assert line_of(ax, label).get_ydata()[0] == level
    for words in ("r̂: accuracy 0.510, rank correlation 0.420", "r_φ: accuracy 0.610"):
        assert words in margins.get_title()
    assert_nothing_is_cut_off(figure)


def test_one_command_draws_every_figure_that_the_points_allow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: file.write(b"-"))
    names = ["frontier.png", "temperature.png", "dial.png", "online.png", "frontier.svg"]
    for points, wanted in ((full_world(), names), (world()[:1], [names[0], names[-1]])):
        path = write_points(tmp_path / str(len(wanted)), points)
        main([str(path.parent)])
        out, table_md = capsys.readouterr().out, (path.parent / "table.md").read_text()
        pictures = [path.parent / name for name in wanted]
        assert out == table_md + "\n" + "".join(f"{p}\n" for p in pictures)
        assert set(path.parent.iterdir()) == {path, path.parent / "table.md", *pictures}
    assert draw_all(path) == pictures, "the file may be given in place of its folder"
