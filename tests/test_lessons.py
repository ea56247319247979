"""lessons.py: the two stages that show the importance weight. Tiny runs, about ten seconds."""

import json

import pytest
import torch
from conftest import TINY, command, folder

import lessons
from evaluate import rank_correlation
from support.settings import PRESETS


def test_sec4_inspect_shows_each_pair_and_its_weight(chain, copied):
    out = copied("sft", "groups", "dpo")
    result = command("--stage", "inspect", *TINY, "--out", out, "--data", chain.data,
                     figures=True)
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
    assert (run / "inspect.png").stat().st_size > 20_000, "the figure is empty"


def test_rank_correlation_is_spearman_s_within_a_prompt():
    r = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.1, 0.4, 0.2, 0.3]])
    assert rank_correlation(r * 7 + torch.tensor([[100.0], [-5.0]]), r) \
        == pytest.approx(1, abs=1e-6), "a scale and an f(x) leave the order alone"
    assert rank_correlation(-r, r) == pytest.approx(-1, abs=1e-6)
    one_swap = torch.tensor([[1.0, 2.0, 4.0, 3.0]])  # 1 - 6 Σd² / (n (n² - 1)) = 1 - 12 / 60
    assert rank_correlation(one_swap, r[:1]) == pytest.approx(0.8, abs=1e-6)


def test_twins_differ_in_their_weight_alone():
    for preset in PRESETS.values():
        a, b = (vars(s).copy() for s in lessons.twins(preset))
        assert {k for k in a if a[k] != b[k]} == {"weight"}
        assert (a["weight"], b["weight"]) == ("sigmoid", "constant")


def test_degenerate_pairs_dpo_with_its_twin(chain, copied, monkeypatch):
    out = copied("sft", "groups")
    monkeypatch.setattr(lessons, "TWIN", lessons.TWIN | dict(dpo_steps=4, eval_every=2))
    result = command("--stage", "degenerate", *TINY, "--out", out, "--data", chain.data,
                     figures=True)
    assert result.code == 0, result.err
    run = folder(out, "degenerate")
    rows = json.loads((run / "degenerate.json").read_text())
    for weight in ("sigmoid", "constant"):
        mine = [row for row in rows if row["weight"] == weight]
        assert [row["step"] for row in mine] == [0, 2, 4]
        assert mine[0]["kl"] == 0 and mine[-1]["kl"] > 0
    starts = [row for row in rows if row["step"] == 0]
    assert {k: v for k, v in starts[0].items() if k != "weight"} == \
        {k: v for k, v in starts[1].items() if k != "weight"}, "both start at the same π_ref"
    assert "w = 1:" in (run / "degenerate.txt").read_text()
    assert "KL" in result.out and (run / "degenerate.png").stat().st_size > 20_000
