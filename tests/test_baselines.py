"""Laws of experiments/baselines.py: the learned reward and Best-of-N, as formulas and as stages."""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KILL, TINY, command, folder, same, stopped, stopped_and_finished

import dpo
from evaluate import pairwise_accuracy, rank_correlation, standard_error
from experiments.baselines import (best_of_kl, expected_best, pair_batches, report_best_of_n,
                                   score_groups)
from job import Job
from reward import ModelReward, RewardModel
from support.runs import load_tensors, save_tensors
from support.settings import parse

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
FEW = [*TINY, "--best-of", "8"]


# ------------------------------------------------------------------------------ the stages


@pytest.fixture(scope="module")
def compared(chain, tmp_path_factory) -> Path:
    """--out with rm and best-of-n at TINY."""
    out = tmp_path_factory.mktemp("baselines") / "out"
    for stage in ("sft", "groups"):
        shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
    result = command("--stage", "best-of-n", *FEW, "--out", out, "--data",
                     chain.data)
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope="module")
def job(chain, compared) -> Job:
    _, preset, _, cfg = parse([*FEW, "--out", str(compared), "--data",
                               str(chain.data)], False)
    return Job(preset, cfg, [])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_eq02_the_reward_model_starts_at_log_2_and_has_mean_0_over_all_samples(job, compared):
    run = folder(compared, "rm")
    steps = [row for row in rows(run) if "eval" not in row]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "its head starts at 0"
    assert max(row["lr"] for row in steps) == job.cfg.rm_lr
    model = RewardModel.load(run / "model.pt")
    scores = score_groups(job, model, range(len(job.groups.prompt_ids)))
    assert scores.shape == job.groups.rewards.shape
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    report = json.loads((run / "report.json").read_text())
    assert report["sd"] == pytest.approx(float(scores.std()), rel=1e-4)


def test_the_checkpoint_of_best_held_out_accuracy_is_kept(job, compared):
    run, held = folder(compared, "rm"), job.split[1]
    report = json.loads((run / "report.json").read_text())
    accuracies = [row["eval"]["accuracy"] for row in rows(run) if "eval" in row]
    assert len(accuracies) >= 3, "two evaluations per epoch"
    assert report["accuracy"] == pytest.approx(max(accuracies), rel=1e-5)
    scores = score_groups(job, RewardModel.load(run / "model.pt"), held)
    r = torch.from_numpy(job.groups.rewards[held])
    yw, yl, _ = dpo.preference_pairs(r)
    again = float(pairwise_accuracy(scores.flatten()[yw], scores.flatten()[yl]).mean())
    assert again == pytest.approx(report["accuracy"], abs=1e-6)
    assert rank_correlation(scores, r) == pytest.approx(report["rank_correlation"], abs=1e-6)


def test_a_better_checkpoint_from_before_a_kill_is_kept(chain, copied):
    """best.pt of a killed run is kept: here its accuracy is one that no other model reaches. If the
    run was killed before its first checkpoint, it starts again and its best.pt is not kept."""
    argv = [*FEW, "--stage", "rm", "--out", str(copied("sft", "groups")), "--data", str(chain.data),
            "--save-secs", "0"]
    _, preset, _, cfg = parse(argv, False)
    job = Job(preset, cfg, argv)
    best = RewardModel.from_gpt(job.load_reference(), cfg.n_ctx)
    torch.nn.init.normal_(best.score.weight)
    state = dict(accuracy=2.0, rank_correlation=0.5, model=best.state_dict())
    job.folder("rm").mkdir()
    save_tensors(job.folder("rm") / "best.pt", state)
    stopped(argv, KILL, "after", "resume.pt")
    if (job.folder("rm") / "best.pt").exists():
        assert load_tensors(job.folder("rm") / "best.pt")["accuracy"] <= 1, "a best.pt of no run"
    save_tensors(job.folder("rm") / "best.pt", state)
    assert command(*argv).code == 0
    kept = RewardModel.load(job.folder("rm") / "model.pt").state_dict()
    for name, value in best.state_dict().items():
        assert name == "score.bias" or torch.equal(kept[name], value), name


def test_every_epoch_of_the_reward_model_has_the_training_groups_in_a_new_order(job):
    def texts(groups):
        return Counter(tuple(x + y) for x, y in zip(*job.groups.flat(groups)))

    train, epochs, steps = job.split[0], [], 2  # of 12 groups each
    batches = pair_batches(job, steps)
    for epoch in range(3):
        micro_batches = [batches(steps * epoch + i)[0][0] for i in range(steps)]
        epochs.append([tuple(idx[:n].tolist()) for m in micro_batches
                       for idx, n in zip(m["idx"], m["lengths"])])
    for rows in epochs:
        assert len(rows) == steps * 12 * 4, "12 groups of 4 completions per step"
        assert not Counter(rows) - texts(train), "a held-out group, or a group twice"
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0], "not reshuffled"


def test_the_reward_model_reads_eos_and_r_star_does_not(job, compared):
    model = RewardModel.load(folder(compared, "rm") / "model.pt")
    torch.nn.init.normal_(model.score.weight)
    eot, words = job.data.eot, [5, 6, 7]
    for learned in (True, False):
        score = ModelReward(model, eot, learned)
        ended, truncated = score([[eot, 9]] * 2, [words + [eot], words])
        assert (ended == truncated) != learned, "EOS is part of a completion, not of a review"


@pytest.mark.parametrize("stage, stops", [
    ("rm", [(KILL, "log"), (KILL, "log", "", 4), (KILL, "torn", "best.pt"),
            (KILL, "torn", "resume.pt", 2), (KILL, "torn", "model.pt")]),
    ("best-of-n", [(KILL, "torn", "resume.pt"), (KILL, "torn", "samples.pt")])])
def test_a_killed_run_resumes_bit_for_bit(chain, copied, compared, stage, stops):
    out = copied("sft", "groups")
    if stage == "best-of-n":
        shutil.copytree(folder(compared, "rm"), out / "toy" / folder(compared, "rm").name)
    stopped_and_finished([*FEW, "--stage", stage, "--data", chain.data, "--out", out], *stops)
    same(folder(out, stage), folder(compared, stage))


# ------------------------------------------------------------------------------ Best-of-N


@pytest.mark.parametrize("N", [1, 2, 3, 6])
def test_expected_best_is_the_mean_over_all_choices(N):
    torch.manual_seed(N)
    scores, rewards = torch.rand(2, 3, 6)
    for p in range(3):
        best = [float(rewards[p, max(c, key=lambda i: float(scores[p, i]))])
                for c in itertools.combinations(range(6), N)]
        assert float(expected_best(scores, rewards, N)[p]) == pytest.approx(np.mean(best))


@pytest.mark.parametrize("N", [1, 2, 4, 128])
def test_best_of_n_kl_is_that_of_the_largest_of_n_uniform_values(N):
    """Over V equally likely values: p(largest = v) = (v^N - (v - 1)^N) / V^N, for large V."""
    V = 200_000
    p = (torch.linspace(0, 1, V + 1, dtype=torch.float64)**N).diff()
    kl = dpo.kl_divergence(p.clamp(min=1e-300).log(), torch.full_like(p, -math.log(V)))
    assert float(kl) == pytest.approx(best_of_kl(N), abs=1e-3)


def test_the_samples_of_best_of_n_are_scored_by_both_rewards(job, compared, capsys):
    state = load_tensors(folder(compared, "best-of-n") / "samples.pt")
    assert state["rewards"].shape == state["learned"].shape == (8, 8)
    assert ((state["rewards"] > 0) & (state["rewards"] < 1)).all()
    assert standard_error(state["learned"].flatten()) > 0
    report_best_of_n(job)
    _, head, one, four, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == "KL, nats by r* by r_φ".split()
    by = [expected_best(state[key], state["rewards"], 4).mean() for key in ("rewards", "learned")]
    assert four.split() == ["best", "of", "4", *(f"{x:.{n}f}" for x, n in zip(
        [best_of_kl(4), *by], (2, 3, 3)))]
    assert one.split()[4] == one.split()[5] == f"{state['rewards'].mean():.3f}", "any sample"
    text = (folder(compared, "best-of-n") / "samples.txt").read_text()
    for row, k in zip(state["rewards"], state["learned"].argmax(1)):
        assert f"after:   r* {float(row[k]):.2f} |" in text, "the best of N by r_φ"
