"""Laws of experiments/online.py: which policy draws the groups, what labels them, and resuming."""

import shutil

import pytest
import torch
from conftest import CTRL_C, KILL, TINY, command, folder, refused, same, stopped_and_finished

from dpo import implicit_reward
from experiments.online import FreshGroups
from job import Job, seed_of
from support.runs import read_rows
from support.settings import parse
from train import score, sequence_logps

ONLINE = (*TINY, "--stage", "online", "--online-every", "3")


@pytest.fixture
def fresh(chain):
    """fresh(flags, moved=False) -> fresh groups of π_ref or, if moved, of another policy."""
    def make(*flags, moved=False) -> FreshGroups:
        argv = [*ONLINE, "--out", str(chain.out), "--data", str(chain.data), *flags]
        _, preset, _, cfg = parse(argv, False)
        job = Job(preset, cfg, argv)
        policy = job.load_reference()
        torch.manual_seed(0)
        for p in policy.parameters():
            p.data += 0.1 * moved * torch.randn_like(p)
        return FreshGroups(job, policy, lambda step: f"stored {step}")

    return make


def repeated(groups: FreshGroups) -> list[list[int]]:
    return [p for p in groups.prompts() for _ in range(4)]


def test_at_step_0_the_fresh_groups_are_samples_of_the_reference(fresh):
    groups = fresh("--online-start", "0")
    (micro_batch,), pairs = groups(0)
    job, prompts = groups.job, repeated(groups)
    assert len(prompts) == 3 * job.cfg.dpo_batch * 4, "the groups of three steps"
    assert set(map(tuple, prompts)) <= {tuple(job.groups.prompt_ids[i]) for i in job.split[0]}
    seed = seed_of(job.cfg, "online 0 samples", 0)
    assert groups.completions == job.sample(job.load_reference(), prompts, seed)
    torch.testing.assert_close(groups.rewards, job.reward(prompts, groups.completions))
    drawn = {(*p, *c) for p, c in zip(prompts, groups.completions)}
    idx, prompt_lens, lengths = (micro_batch[k] for k in ("idx", "prompt_lens", "lengths"))
    assert {tuple(row[:n]) for row, n in zip(idx.tolist(), lengths.tolist())} <= drawn
    assert pairs == len(micro_batch["yw_idxs"]) > 0


def test_the_reference_log_probs_of_fresh_groups_are_those_of_the_reference(fresh):
    groups = fresh("--online-start", "0", moved=True)
    (micro_batch,), _ = groups(0)
    padded = [micro_batch[k] for k in ("idx", "prompt_lens", "lengths")]
    ref_logps, logps = (sequence_logps(model, *padded).detach()
                        for model in (groups.reference, groups.policy))
    torch.testing.assert_close(micro_batch["ref_logps"], ref_logps, rtol=0, atol=1e-4)
    assert (logps - ref_logps).abs().max() > 0.1, "the policy differs from the reference"


def test_groups_are_drawn_once_per_round_from_the_policy_at_its_start(fresh):
    groups = fresh("--online-start", "2")
    assert groups(1) == "stored 1", "before online_start the stored groups are used"
    seen = []
    for step in range(2, 8):
        groups(step)
        seen.append([*map(tuple, groups.completions)])
        for p in groups.policy.parameters():
            p.data += 0.1 * torch.randn_like(p)
    assert seen[0] == seen[1] == seen[2] != seen[3] == seen[4] == seen[5]
    seed = seed_of(groups.job.cfg, "online 0 samples", 1)
    reference = groups.job.sample(groups.reference, repeated(groups), seed)
    assert [*map(tuple, reference)] != seen[3], "the second round is drawn from the policy"


def test_with_self_labels_the_rewards_are_implicit_rewards(fresh):
    groups = fresh("--online-labels", "self", "--online-start", "1", moved=True)
    groups(1)
    prompts = repeated(groups)
    logps, ref_logps = (score(groups.job, model, prompts, groups.completions)
                        for model in (groups.policy, groups.reference))
    wanted = implicit_reward(logps, ref_logps, groups.job.cfg.beta)
    torch.testing.assert_close(groups.rewards, wanted)
    true = groups.job.reward(prompts, groups.completions)
    assert not torch.equal(true.view(-1, 4).argmax(1), wanted.view(-1, 4).argmax(1))


def test_the_first_steps_of_online_are_those_of_dpo(chain, copied):
    out = copied("sft", "groups")
    result = command(*ONLINE, "--online-start", "3", "--data", chain.data, "--out", out)
    assert result.code == 0 and "optimum at that KL" in result.out, result.err
    rows, dpo_rows = ([row["loss"] for row in read_rows(path / "metrics.jsonl") if "loss" in row]
                      for path in (folder(out, "online"), folder(chain.out, "dpo")))
    assert len(rows) == len(dpo_rows) == 6, "the same number of updates"
    assert rows[:3] == dpo_rows[:3] and rows[3] != dpo_rows[3]


def test_a_stopped_online_run_resumes_bit_for_bit(chain, copied, tmp_path):
    out, argv = copied("sft", "groups"), [*ONLINE, "--online-start", "1", "--data", chain.data]
    stopped_and_finished([*argv, "--out", out], (KILL, "log", "", 2), (KILL, "log", "", 2),
                         (KILL, "sample", "", 9), (KILL, "after", "resume.pt", 2), (CTRL_C, "log"))
    whole = shutil.copytree(out, tmp_path / "whole")
    shutil.rmtree(folder(whole, "online"))
    assert command(*argv, "--out", whole).code == 0
    same(folder(out, "online"), folder(whole, "online"))


@pytest.mark.parametrize("flags, words", [
    ("--online-labels self --online-start 0", "give an --online-start above 0"),
    ("--loss plackett-luce", "leave --loss plackett-luce out"),
    ("--online-start 6", "give an --online-start below --dpo-steps"),
    ("--train-prompts 9", "leave --train-prompts out"),
    ("--groups some.jsonl", "give --online-labels self")])
def test_what_online_cannot_do_is_refused(chain, tmp_path, flags, words):
    argv = *ONLINE, "--online-start", "1", *flags.split(), "--data", chain.data, "--out", tmp_path
    refused(command(*argv), words)
    assert not [*tmp_path.rglob("model.pt")]
