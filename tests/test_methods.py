"""methods.py: the learned reward, PPO and Best-of-N as stages. Tiny runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, command, folder, refused
from test_pipeline import killed_and_finished, same

import dpo
import methods
import train
from evaluate import standard_error
from methods import best_of_kl, expected_best
from pipeline import STAGES
from reward import ModelReward, RewardModel
from stages import Context, completions_of, split_prompts
from support.runs import load_tensors
from support.settings import TOY, Settings, parse


@pytest.fixture(scope="module")
def compared(chain, tmp_path_factory):
    """rm, ppo, ppo-gt and best-of-n at TINY."""
    import shutil
    out = tmp_path_factory.mktemp("methods") / "out"
    for stage in ("sft", "groups"):
        shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
    for stage in ("ppo", "ppo-gt", "best-of-n"):
        result = command("--stage", stage, *TINY, "--best-of", 8, "--out", out, "--data",
                         chain.data)
        assert result.code == 0, result.err
    return out


@pytest.fixture
def ctx(chain, compared):
    _, name, _, s = parse([*TINY, "--best-of", "8", "--out", str(compared), "--data",
                           str(chain.data)], STAGES, False)
    return Context(name, s, [])


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------ r_φ


def test_eq02_the_reward_model_starts_at_log_2_and_has_mean_0_over_all_samples(ctx, compared):
    run, made = folder(compared, "rm"), ctx.groups
    first = rows(run)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), "zero head: indifferent"
    judge = ModelReward(RewardModel.load(run / "model.pt"), ctx.data.eot, learned=True)
    scores = judge(*completions_of(made, range(len(made.prompt_ids))))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    report = json.loads((run / "report.json").read_text())
    assert report["sd"] == pytest.approx(float(scores.std()), rel=1e-4)


def test_the_checkpoint_of_best_validation_accuracy_is_kept(ctx, compared):
    run = folder(compared, "rm")
    report, evals = json.loads((run / "report.json").read_text()), [
        r["eval"] for r in rows(run) if "eval" in r]
    assert len(evals) >= 3, "two a pass"
    assert report["accuracy"] == max(e["accuracy"] for e in evals)
    _, held = split_prompts(ctx.groups.prompt_ids)
    again = methods.on_pairs(ctx, RewardModel.load(run / "model.pt"), held)
    assert again["accuracy"] == pytest.approx(report["accuracy"], abs=1e-6)
    assert again["rank_correlation"] == pytest.approx(report["rank_correlation"], abs=1e-6)


def test_the_reward_model_reads_the_end_that_r_star_s_judge_leaves_out(ctx, compared):
    model = RewardModel.load(folder(compared, "rm") / "model.pt")
    torch.nn.init.normal_(model.score.weight)
    eot, words = ctx.data.eot, [5, 6, 7]
    for learned in (True, False):
        judge = ModelReward(model, eot, learned)
        ended, cut_off = judge([[eot, 9]] * 2, [words + [eot], words])
        assert (ended == cut_off) != learned, "an end is part of a completion, not of a review"


def test_rm_killed_and_finished_is_the_same(chain, copied, compared):
    out = copied("sft", "groups")
    killed_and_finished(["--stage", "rm", *TINY, "--data", chain.data, "--out", out],
                        [("log",), ("log", "", 5), ("torn", "resume.pt", 2), ("torn", "model.pt")])
    same(folder(out, "rm"), folder(compared, "rm"))


# ------------------------------------------------------------------------------ PPO


@pytest.mark.parametrize("stage", ["ppo", "ppo-gt"])
def test_ppo_logs_what_it_was_trained_on_apart_from_the_truth(compared, stage):
    run = folder(compared, stage)
    steps = [r for r in rows(run) if "eval" not in r]
    wanted = {"kl", "clip_fraction", "approx_kl", "explained_variance", "entropy", "reward",
              "beta", "value_loss"} | ({"true_reward"} if stage == "ppo" else set())
    assert len(steps) == 4 and wanted <= steps[-1].keys(), wanted - steps[-1].keys()
    if stage == "ppo":
        assert all(abs(r["reward"] - r["true_reward"]) > 1e-3 for r in steps), "r_φ is not r*"
    result = json.loads((run / "result.json").read_text())
    if stage == "ppo-gt":
        assert result["reward_learned"] == pytest.approx(result["reward"], abs=1e-4)
    assert steps[-1]["samples"] == 4 * 8 and steps[-1]["forwards"] > steps[-1]["samples"]


def test_ppo_killed_and_finished_is_the_same(chain, copied, compared):
    out = copied("sft", "groups")
    killed_and_finished(["--stage", "ppo-gt", *TINY, "--data", chain.data, "--out", out],
                        [("log",), ("log", "", 2), ("torn", "resume.pt", 2), ("torn", "model.pt")])
    same(folder(out, "ppo-gt"), folder(compared, "ppo-gt"))


def test_ppo_that_diverges_says_so(chain, copied, monkeypatch):
    out = copied("sft", "groups")
    step = methods.PPO.step
    monkeypatch.setattr(methods.PPO, "step", lambda self, i, *a: step(self, i, *a) | (
        dict(policy_loss=math.nan) if i == 2 else {}))
    result = command("--stage", "ppo-gt", *TINY, "--save-secs", 0, "--data", chain.data, "--out",
                     out)
    refused(result, "not finite at step 2", "checkpoint is step 2", "--ppo-lr")


def test_other_people_s_preferences_have_no_r_star(chain, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    for stage in ("ppo-gt", "best-of-n", "frontier"):
        refused(command("--stage", stage, *TINY, "--groups", mine, "--out", tmp_path, "--data",
                        chain.data), "needs r*", "--groups")


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
def test_best_of_n_kl_is_that_of_the_largest_of_n(N):
    """Over V equally likely values: p(largest = v) = (v^N - (v - 1)^N) / V^N, V to infinity."""
    V = 200_000
    edges = torch.linspace(0, 1, V + 1, dtype=torch.float64)**N
    p = edges.diff()
    kl = dpo.kl_divergence(p.clamp(min=1e-300).log(), torch.full_like(p, -math.log(V)))
    assert float(kl) == pytest.approx(best_of_kl(N), abs=1e-3)


def test_best_of_n_s_samples_are_judged_by_both_rewards(ctx, compared):
    state = load_tensors(folder(compared, "best-of-n") / "samples.pt")
    assert state["rewards"].shape == state["learned"].shape == (8, 8)
    assert ((state["rewards"] > 0) & (state["rewards"] < 1)).all()
    assert standard_error(state["learned"].flatten()) > 0
    text = (folder(compared, "best-of-n") / "samples.txt").read_text()
    best = state["learned"].argmax(1)
    for row, k in zip(state["rewards"], best):
        assert f"after:   r* {float(row[k]):.2f} |" in text, "the best of N by r_φ"


# ------------------------------------------------------------------------------ other losses


@pytest.mark.parametrize("stage", ["unlikelihood", "preferred-ft"])
def test_other_losses_are_stages_of_their_own(chain, copied, stage):
    out = copied("sft", "groups")
    argv = ["--stage", stage, *TINY, "--out", out, "--data", chain.data]
    assert command(*argv, "--alpha", 0.25).code == 0
    run = folder(out, stage)
    steps = [r for r in rows(run) if "eval" not in r]
    nll = -steps[0]["logp_chosen"]
    wanted = nll + 0.25 * steps[0]["logp_rejected"] if stage == "unlikelihood" else nll
    assert steps[0]["loss"] == pytest.approx(wanted, rel=1e-5), "C.3, from π_ref"
    assert steps[0]["margin_abs"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["logp_chosen"] != steps[0]["logp_chosen"]
    refused(command(*argv, "--labels", "soft"), "--labels soft")


def test_labels_are_hard_sampled_or_soft():
    torch.manual_seed(0)
    rewards = torch.rand(3000, 4)
    rewards[0] = torch.tensor([0.5, 0.5, 0.1, 0.9])
    picks, s = np.arange(3000), Settings(labels="soft", label_scale=3.0)
    flat, luck = rewards.flatten(), torch.rand(3000, 6)
    yw, yl, p = train.label_pairs(rewards, s, picks, luck)
    assert len(yw) == 6 * 3000, "a tie is half a label each way"
    assert (flat[yw] >= flat[yl]).all()
    torch.testing.assert_close(p, torch.sigmoid(3 * (flat[yw] - flat[yl])))  # Eq. 1
    hard_w, _, one = train.label_pairs(rewards, TOY, picks, None)
    assert len(hard_w) == 6 * 3000 - 1 and (one == 1).all(), "hard: ties are dropped"
    s = Settings(labels="sampled", label_scale=3.0)
    w, l, one = train.label_pairs(rewards, s, picks, luck)
    assert (one == 1).all() and len(w) == len(yw)
    wins, error = (flat[w] > flat[l]).float().mean(), 3 * 0.5 / math.sqrt(len(w))
    assert float(wins) == pytest.approx(float(p.mean()), abs=error), "drawn from Eq. 1"
    again = train.label_pairs(rewards[5:7], s, np.array([5, 6]), luck)
    assert torch.equal(again[0], w.view(3000, 6)[5:7].flatten() - 20), "a label is drawn once"
