"""Laws of experiments/lessons.py: the two stages that show the importance weight."""

import json

import pytest
import torch
from conftest import TINY, command, folder

from experiments import lessons
from support.settings import PRESETS


def test_sec4_inspect_shows_each_pair_and_its_weight(chain, copied):
    out = copied("sft", "groups", "dpo")
    result = command("--stage", "inspect", *TINY, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    run = folder(out, "inspect")
    table = json.loads((run / "inspect.json").read_text())
    assert table["pairs"], "no pair was inspected"
    for pair in table["pairs"]:
        sigmoid = float(torch.sigmoid(torch.tensor(-pair["margin"])))
        assert pair["weight"] == pytest.approx(sigmoid, abs=1e-6), "DPO's weight is σ(-m)"
        assert pair["reward_gap"] > 0, "y_w is the one that r* prefers"
        assert pair["margin"] == pytest.approx(pair["reward_w"] - pair["reward_l"], abs=1e-5)
        low = abs(pair["norm_w"] - pair["norm_l"])
        push = pair["update"] / (table["beta"] * pair["weight"])  # |∇w - ∇l|
        assert low - 1e-3 <= push <= pair["norm_w"] + pair["norm_l"] + 1e-3, "triangle inequality"
        assert -1.0001 <= pair["cosine"] <= 1.0001
    assert 0 <= table["accuracy"] <= 1
    assert all(-1 <= table[key] <= 1 for key in ("rank_correlation", "correlation"))
    text = (run / "inspect.txt").read_text()
    assert "largest weights" in text and "y_w" in text and text.splitlines()[2] in result.out
    assert (run / "inspect.png").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_ablation_changes_the_weight_alone(preset):
    a, b = map(vars, lessons.weight_ablation(PRESETS[preset]))
    assert {k for k in a if a[k] != b[k]} == {"weight"}
    assert (a["weight"], b["weight"]) == ("sigmoid", "constant")


def test_degenerate_compares_dpo_with_a_constant_weight(chain, copied, monkeypatch):
    out = copied("sft", "groups")
    monkeypatch.setattr(lessons, "ABLATION",
                        lessons.ABLATION | dict(dpo_steps=4, eval_every=2))
    result = command("--stage", "degenerate", *TINY, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    run = folder(out, "degenerate")
    rows = json.loads((run / "degenerate.json").read_text())
    for weight in ("sigmoid", "constant"):
        mine = [row for row in rows if row["weight"] == weight]
        assert [row["step"] for row in mine] == [0, 2, 4]
        assert mine[0]["kl"] == 0 and mine[-1]["kl"] > 0
    starts = [{k: v for k, v in row.items() if k != "weight"} for row in rows if row["step"] == 0]
    assert starts[0] == starts[1], "both start at the same π_ref"
    assert "w = 1:" in (run / "degenerate.txt").read_text()
    assert "KL" in result.out and (run / "degenerate.png").exists()
