"""Laws of support/points.py: figures can draw all that it returns, and it names skipped lines."""

import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_plot_frontier import evaluation, frontier_point, step_row, world, write_points, write_run

from experiments.figures import draw_all
from support.points import DPO_LOGGED, number, numbers, read_curves, read_points
from support.runs import UserError

RESULTS = Path(__file__).parents[1] / "results"
NO_NUMBERS = ["x", "0.5", "", True, [1], {}, math.nan, math.inf, -math.inf, 1e40, -1e40, 10**400]


def test_a_number_is_what_float32_holds():
    for x in (0, -1, 2**32 - 1, 0.5, -0.0, 3.4e38, -3.4e38, 1e-300):
        assert number(x) == x
    for x in NO_NUMBERS:
        with pytest.raises(ValueError, match="is no number"):
            number(x)
    assert numbers(dict(kl=-1e-9, win=None, kl_se=0), ["kl", "win", "kl_se"])["win"] is None
    for wrong in (dict(kl=1, kl_se=-1e-9), dict(kl=1), dict(kl="1", kl_se=1)):
        with pytest.raises((ValueError, KeyError)):
            numbers(wrong, ["kl", "kl_se"])


# ------------------------------------------------------------------------------ frontier.jsonl

def test_lines_that_hold_no_point_are_skipped_counted_and_named(tmp_path, capsys):
    good = world()[:6]
    p = good[0]
    foreign = [
        b"", b"{torn", b"[1, 2]", b"7", b"null", b"\xff\xfe", b"[" * 5000, b'{"a":' * 5000,
        json.dumps(p).replace('"kl": 0.0', f'"kl": {"9" * 5000}').encode(),
        {k: v for k, v in p.items() if k != "length"}, good[2] | dict(kls=[0.1]),
        good[1] | dict(rewards=[0.5, 0.4], kls=[0.1, 0.2]), p | dict(preset="imdb"),
        *(p | {key: x} for x in [*NO_NUMBERS, None] for key in (
            "seed", "step", "temperature", "kl", "kl_se", "reward", "reward_se")),
        *(p | {key: x} for x in NO_NUMBERS for key in (
            "kl_mc", "win", "ess", "seconds", "samples")),
        *(p | {key: [x, *p[key][1:]]} for x in [*NO_NUMBERS, None] for key in ("rewards", "kls")),
        *(p | {key: x} for x in ("x" * 60, None, 5, {}) for key in ("rewards", "kls")),
        *(p | {key: -1e-9} for key in ("kl_se", "reward_se", "win")), p | dict(win=1.01),
        *(p | {key: x} for key in ("preset", "model", "method", "setting") for x in (
            None, 7, ["toy"], {}, "$x$", r"$\frac{$", "a\nb", "\x1b[1m", "\ud800", "x" * 10_000)),
        *(p | dict(setting=x) for x in ("beta=?", "beta=nan", "beta=1e999", "beta=1=2"))]
    path = write_points(tmp_path, [*good[:3], *foreign, *good[3:]])
    assert read_points(path) == read_points(tmp_path) == good, "all other lines are kept, in order"
    said, again = capsys.readouterr().err.splitlines()
    assert said == again and f"{len(foreign)} of {len(foreign) + 6} lines of {path}" in said
    assert said.endswith(f": 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and {len(foreign) - 10} more")
    read_points(write_points(tmp_path, good))
    assert capsys.readouterr().err == "", "no line was skipped"


@pytest.mark.parametrize("name", ["toy", "imdb-cpu"])
def test_every_committed_line_is_a_point(name, capsys):
    path = RESULTS / name / "frontier.jsonl"
    assert read_points(path) == [json.loads(line) for line in path.read_text().splitlines()]
    assert capsys.readouterr().err == ""


def test_a_point_may_have_an_older_key(tmp_path):
    older = [p | dict(forwards=7) for p in world()[:3]]
    assert read_points(write_points(tmp_path, older)) == older


def test_all_points_that_are_read_can_be_drawn(tmp_path, monkeypatch, capsys):
    """Also the largest numbers that are allowed, alone and together."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: (
        self.draw_without_rendering(), file.write(b"-")))
    huge = [frontier_point("dpo", "beta=1", 3e38, -3e38, step=1, win=0.5),
            frontier_point("dpo", "beta=1", -1e-9, 0.5, step=2),
            frontier_point("ppo", "target=1", 1.0, 0.7, seed=2**32 - 1, step=10**9, kl_se=3e38,
                           temperature=0.5, win=1.0, samples=10**12)]
    for i, points in enumerate((huge[:2], huge[2:], huge)):
        path = write_points(tmp_path / str(i), [*world(), *points])
        assert len(draw_all(path)) == 2 + (i > 0) and read_points(path)[-1] == points[-1]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------ a run's curves

def test_the_steps_and_evaluations_of_a_run_are_those_that_were_logged(tmp_path):
    folder = write_run(tmp_path, 40)
    for i, text in enumerate(("", "5", "{}", '{"files": 5}')):  # damaged groups of other runs
        (folder.parent / f"groups-{i}").mkdir()
        (folder.parent / f"groups-{i}" / "config.json").write_text(text)
    run, steps, evals, optimum = read_curves(folder)
    assert run == dict(title="DPO, β 0.5", stage="dpo", loss="pairwise", beta=0.5,
                       num_completions=4)
    assert steps == [step_row(i, 40) for i in range(40)]
    assert [(p["kl"], p["ess"]) for p in optimum] == [(0.5, 16), (1, 8), (3, 8 / 3)], "by KL"
    assert evals == [evaluation(t / 40, True) | dict(
        step=t, accuracy=0.5 + 0.3 * t / 40 if t else None) for t in (0, 10, 20, 30, 40)]


def spoiled(row: dict):
    """Damaged copies of the row, which no figure can show: (what is wrong, the row)."""
    values = row.get("eval", row)
    for key in values:
        for x in NO_NUMBERS:
            changed = values | {key: x}
            yield f"{key} = {x!r:.9}", row | {"eval": changed} if "eval" in row else changed
        if key not in ("accuracy", "step"):
            missing = {k: v for k, v in values.items() if k != key}
            yield f"no {key}", row | {"eval": missing} if "eval" in row else missing


def test_a_damaged_run_is_one_sentence_that_names_the_file(tmp_path):
    run = write_run(tmp_path, 4)
    reference_json = run.parent / "groups-x" / "reference.json"
    path = run / "metrics.jsonl"
    good = [json.loads(line) for line in path.read_text().splitlines()]
    at = next(i for i, row in enumerate(good) if "eval" in row)
    step = {k: good[2][k] for k in DPO_LOGGED} | dict(step=1)
    rows = [(what, row, 2) for what, row in spoiled(step) if "step" not in what]
    rows += [(what, row, at) for what, row in spoiled(good[at])]
    rows += [(str(x), dict(step=3, eval=x), at) for x in (5, None, [], "x", {})]
    for what, row, i in rows:
        path.write_text("".join(json.dumps(x) + "\n" for x in (*good[:i], row, *good[i + 1 :])))
        with pytest.raises(UserError, match="metrics.jsonl is damaged"):
            read_curves(run)
            pytest.fail(f"{what} passes")
    path.write_text("".join(json.dumps(x) + "\n" for x in good))
    start = json.loads(reference_json.read_text())["point"]
    best = [dict(kl=1, reward=0.7, ess=4)]
    assert json.loads(reference_json.read_text())["optimum"]
    for text in ("{}", "5", "[]", "null", "", "[" * 10_000, '{"point": 5}', '{"point": {}}', *(
            json.dumps(dict(point=row["eval"], optimum=best)) for _, row in spoiled(
                dict(eval=start))), *(json.dumps(dict(point=start, optimum=[row["eval"]]))
                                      for _, row in spoiled(dict(eval=best[0])))):
        reference_json.write_text(text)
        with pytest.raises(UserError, match="reference.json is damaged"):
            read_curves(run)
