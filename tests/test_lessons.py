"""Laws of experiments/lessons.py: inspect, degenerate and overoptimisation."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, command, folder

from evaluate import read_samples
from experiments import lessons
from support.settings import PRESETS


def test_sec4_inspect_shows_each_pair_and_its_weight(chain, copied, job):
    out = copied("sft", "groups", "dpo")
    result = command("--stage", "inspect", *TINY, "--out", out, "--data", chain.data)
    assert result.code == 0, result.err
    run = folder(out, "inspect")
    table = json.loads((run / "inspect.json").read_text())
    assert table["pairs"], "there is no pair"
    for pair in table["pairs"]:
        sigmoid = float(torch.sigmoid(torch.tensor(-pair["margin"])))
        assert pair["weight"] == pytest.approx(sigmoid, abs=1e-6), "DPO's weight is σ(-m)"
        assert pair["reward_gap"] > 0, "r* prefers y_w"
        assert pair["margin"] == pytest.approx(pair["reward_w"] - pair["reward_l"], abs=1e-5)
        low = abs(pair["norm_w"] - pair["norm_l"])
        push = pair["update"] / (table["beta"] * pair["weight"])  # |∇w - ∇l|
        assert low - 1e-3 <= push <= pair["norm_w"] + pair["norm_l"] + 1e-3, "triangle inequality"
        assert -1.0001 <= pair["cosine"] <= 1.0001
    assert 0 <= table["accuracy"] <= 1
    assert all(-1 <= table[key] <= 1 for key in ("rank_correlation", "correlation"))
    logps, r = (x[job.split[1]].tolist() for x in (job.ref_logps, job.groups.rewards))
    right = [a > b for x, y in zip(logps, r) for a, p in zip(x, y) for b, q in zip(x, y) if p > q]
    assert table["ref_logp_accuracy"] == pytest.approx(sum(right) / len(right))
    for key, name in ("logp_accuracy", "log π_θ orders"), ("ref_logp_accuracy", "log π_ref"):
        assert f"{name} {table[key]:.1%}" in result.out
    text = (run / "inspect.txt").read_text()
    assert "largest weights" in text and "y_w" in text and text.splitlines()[2] in result.out
    assert (run / "inspect.png").exists()


def test_a_pair_of_texts_with_line_breaks_has_two_lines(job):
    enc = job.data.enc
    prompt, yw, yl = map(enc.encode_ordinary, ("User:\n\nHi", " was\nfine.", " was dull."))
    row = dict.fromkeys("weight margin reward_gap norm_w norm_l cosine update".split(), 0.5)
    text = lessons.inspection_text(job, [row], torch.tensor([0]), torch.tensor([1]),
                                   [[enc.eot_token, *prompt]] * 2, [[*yw, enc.eot_token], yl])
    pair = "  y_w  User:⏎⏎Hi| was⏎fine.\n  y_l  User:⏎⏎Hi| was dull.\n"
    assert text.count(pair) == 2, "among the largest and among the smallest weights"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("weight", ["sigmoid", "constant", "ipo"])
def test_the_ablation_changes_only_the_weight_or_only_the_loss(preset, weight):
    runs = lessons.loss_ablation(replace(PRESETS[preset], weight=weight, run_seed=4))
    names = ["sigmoid", "constant", "reference-free"] + ["ipo"] * (weight == "ipo")
    assert [*runs] == [f"{name} {seed}" for name in names for seed in (4, 5, 6)]
    dpo_run = vars(runs["sigmoid 4"])
    assert [dpo_run[key] for key in ("weight", "loss", "labels")] == ["sigmoid", "pairwise", "hard"]
    for name, run in runs.items():
        kind, seed = name.split()
        other = {} if kind == "sigmoid" else dict(loss=kind) if "-" in kind else dict(weight=kind)
        assert vars(run) == dpo_run | other | dict(run_seed=int(seed)), name


def test_degenerate_compares_dpo_with_other_weights_on_every_seed(chain, copied, monkeypatch,
                                                                  tmp_path):
    out, weight = copied("sft", "groups"), tmp_path / "my.py"
    weight.write_text("def half(margin, beta):\n    return margin * 0 + 0.5\n")
    monkeypatch.setattr(lessons, "ABLATION",
                        lessons.ABLATION | dict(dpo_steps=4, eval_every=2))
    monkeypatch.setattr(lessons, "SEEDS", 2)
    argv = ["--stage", "degenerate", *TINY, "--out", out, "--data", chain.data]
    result = command(*argv, "--weight", f"{weight}:half")
    assert result.code == 0, result.err
    run = folder(out, "degenerate")
    rows = json.loads((run / "degenerate.json").read_text())
    names = {"sigmoid": "DPO", "constant": "w = 1", "reference-free": "no π_ref",
             f"{weight}:half": "w = half"}
    assert [*dict.fromkeys(row["weight"] for row in rows)] == [*names]
    runs = {}
    for row in rows:
        runs.setdefault((row["weight"], row["seed"]), []).append(row)
    assert [*runs] == [(name, seed) for name in names for seed in (0, 1)]
    for mine in runs.values():
        assert [row["step"] for row in mine] == [0, 2, 4]
        assert mine[0]["kl"] == 0 and mine[-1]["kl"] > 0
    starts = [{**mine[0], "weight": "", "seed": 0} for mine in runs.values()]
    assert all(start == starts[0] for start in starts), "all start at the same π_ref"
    ends = {json.dumps(mine[-1]["kl"]) for mine in runs.values()}
    assert len(ends) == 8, "every loss and every seed gives another policy"
    blocks = read_samples(run / "degenerate.txt")
    labels = [f"{name}:".ljust(10) for name in ("prompt", "π_ref", *names.values())]
    samples = {}
    for path in out.glob("toy/dpo*/samples.txt"):
        settings = json.loads((path.parent / "config.json").read_text())["settings"]
        samples[settings["loss"], settings["weight"], settings["run_seed"]] = read_samples(path)
    mine = [samples[key] for key in (("pairwise", "sigmoid", 0), ("pairwise", "constant", 0), (
        "reference-free", "sigmoid", 0), ("pairwise", f"{weight}:half", 0))]
    assert len(samples) == len(blocks) == 8
    for i, block in enumerate(blocks):
        texts = [*mine[0][i][:2], *(lines[i][2] for lines in mine)]
        assert block == [label + text[9:] for label, text in zip(labels, texts, strict=True)]
    for name, label in names.items():
        for seed in (0, 1):
            (line,) = [x for x in result.out.splitlines() if x.startswith(f"{label}, seed {seed}")]
            assert f"{runs[name, seed][-1]['ref_ppl']:.1f}" in line
        assert (f"{label} ends at " in result.out) == (label != "DPO")
    assert "\n".join(blocks[0]) in result.out and (run / "degenerate.png").exists()
    assert all(len(x) <= 100 for x in result.out.splitlines() if "π_ref" in x and ":" not in x)


def test_overoptimisation_compares_dpo_on_fewer_and_more_groups(chain, copied, job):
    assert [*lessons.data_ablation(job)] == [f"{len(job.split[0])} prompts"], "all: fewer than 60"
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
    assert "highest r*" in result.out and (folder(out, "overoptimisation") /
                                               "overoptimisation.png").exists()
