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
def test_the_ablation_changes_the_weight_alone_or_the_loss_alone(preset):
    a, b, c = map(vars, lessons.loss_ablation(PRESETS[preset]).values())
    for other, changed in ((b, "weight"), (c, "loss")):
        assert {k for k in a if a[k] != other[k]} == {changed}
    assert (a["weight"], b["weight"]) == ("sigmoid", "constant")
    assert (a["loss"], c["loss"]) == ("pairwise", "reference-free")


def test_degenerate_compares_dpo_with_a_constant_weight(chain, copied, monkeypatch):
    out = copied("sft", "groups")
    monkeypatch.setattr(lessons, "ABLATION",
                        lessons.ABLATION | dict(dpo_steps=4, eval_every=2))
    result = command("--stage", "degenerate", *TINY, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    run = folder(out, "degenerate")
    rows = json.loads((run / "degenerate.json").read_text())
    for weight in ("sigmoid", "constant", "reference-free"):
        mine = [row for row in rows if row["weight"] == weight]
        assert [row["step"] for row in mine] == [0, 2, 4]
        assert mine[0]["kl"] == 0 and mine[-1]["kl"] > 0
    starts = [{k: v for k, v in row.items() if k != "weight"} for row in rows if row["step"] == 0]
    assert starts[0] == starts[1] == starts[2], "all start at the same π_ref"
    text = (run / "degenerate.txt").read_text()
    assert text.count("w = 1:") == text.count("no π_ref:") == text.count("after:") == 8
    assert "w = 1 over DPO: KL" in result.out and "no π_ref over DPO: KL" in result.out
    assert (run / "degenerate.png").exists()


def test_overoptimisation_compares_dpo_on_fewer_and_more_groups(chain, copied, job):
    assert [*lessons.data_ablation(job)] == [f"{len(job.split[0])} prompts"], "60 are not there"
    job.split = list(range(700)), job.split[1]
    runs = lessons.data_ablation(job)
    assert [*runs] == ["60 prompts", "600 prompts", "700 prompts"]
    assert [cfg.train_prompts for cfg in runs.values()] == [60, 600, 0]
    assert {cfg.beta for cfg in runs.values()} == {0.5}
    out = copied("sft", "groups")
    result = command("--stage", "overoptimisation", *TINY, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    rows = json.loads((folder(out, "overoptimisation") / "overoptimisation.json").read_text())
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert rows[0]["kl"] == rows[0]["implicit"] == 0
    logged = [row["eval"] for row in map(json.loads, (
        folder(out, "dpo") / "metrics.jsonl").read_text().splitlines()) if "eval" in row]
    assert [row["implicit"] for row in rows[1:]] == [0.5 * e["kl_mc"] for e in logged]
    assert "r* at its peak" in result.out and (folder(out, "overoptimisation") /
                                               "overoptimisation.png").exists()
