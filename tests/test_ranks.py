"""Laws of support/ranks.py, in processes of torchrun, and in pairs of forked children that are
ranks 0 and 1."""

import functools
import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import KILL, TINY, command, die, folder, in_child, same, train_py

from job import Job
from support import ranks
from support.runs import Run, UserError, main_exit, read_rows
from support.settings import PRESETS

STORES = itertools.count()


def pair(tmp_path, work) -> list[tuple[int, str]]:
    """The exit code and the output of work(rank) in two processes, ranks 0 and 1."""
    path = str(tmp_path / f"store{next(STORES)}")

    def as_rank(rank):
        def child():
            ranks.RANK, ranks.WORLD = rank, 2
            ranks.store = functools.cache(lambda: dist.FileStore(path, 2))
            return work(rank)

        return in_child(child)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(as_rank, (0, 1)))


def commands(tmp_path, *argv) -> str:
    """Runs train.py as two ranks. Returns what rank 0 printed."""
    (code, text), (other, silence) = pair(tmp_path, lambda rank: train_py(argv))
    assert code == other == 0, text + silence
    assert silence == "", "rank 1 prints nothing"
    return text


@pytest.fixture(scope="module")
def one(tmp_path_factory, data):
    """The chain, made by one process with two micro-batches per step."""
    out = tmp_path_factory.mktemp("one")
    result = command(*TINY, "--sft-accum", 2, "--dpo-accum", 2, "--out", out, "--data", data)
    assert result.code == 0, result.err
    return out


# ------------------------------------------------------------------------------ the same numbers


def test_two_processes_equal_one_with_two_micro_batches(tmp_path, data, one):
    """Weights, preferences, log-probs and logs are equal byte for byte, also with dropout."""
    text = commands(tmp_path, *TINY, "--out", tmp_path, "--data", data)
    assert text.count("dpo: done in") == 1 and "reward r*" in text
    for stage in ("sft", "groups", "dpo"):
        same(folder(tmp_path, stage), folder(one, stage))
    about = json.loads((folder(tmp_path, "dpo") / "config.json").read_bytes())["about"]
    assert about["processes"] == 2


def test_two_processes_train_the_same_reward_model_and_sample_the_same_best_of_n(
        tmp_path, data, one):
    argv = [*TINY, "--best-of", 4, "--data", data, "--stage", "best-of-n"]
    assert command(*argv, "--out", one).code == 0
    commands(tmp_path, *argv, "--out", tmp_path)
    a, b = ([row["loss"] for row in read_rows(folder(out, "rm") / "metrics.jsonl") if "loss" in row]
            for out in (one, tmp_path))
    assert a == pytest.approx(b, rel=1e-4) and len(a) > 4
    a, b = (torch.load(folder(out, "best-of-n") / "samples.pt") for out in (one, tmp_path))
    assert torch.equal(a["rewards"], b["rewards"])


def test_all_processes_train_r_star_of_imdb(tmp_path):
    """Each rank has a part of the whole reviews and a part of the crops."""
    import numpy as np

    from reward import label_batches
    tokens = [np.arange(n) for n in range(20, 40)]
    labels = np.arange(20, dtype=np.float32)
    whole, halves = ([m["idx"] for m in label_batches(
        tokens, labels, 6, 64, 16, np.random.default_rng(0), parts)] for parts in (1, 2))
    assert len(whole) == 2 and len(halves) == 4
    for big, small in zip(whole, (halves[:2], halves[2:])):
        rows = [row[row > 0].tolist() for part in small for row in part]
        assert rows == [row[row > 0].tolist() for row in big]


# ------------------------------------------------------------------------------ stops and faults


@pytest.mark.parametrize("kind, name, n", [("log", "", 5), ("torn", "model.pt", 2)])
def test_a_killed_run_goes_on(tmp_path, data, one, kind, name, n):
    argv = [*TINY, "--out", tmp_path, "--data", data]

    def work(rank):
        if rank == 0:
            die(KILL, kind, name, n)
        return train_py([*argv, "--save-secs", 0])

    (code, _), (other, _) = pair(tmp_path, work)
    assert code == -KILL and other != 0, "no rank goes on without the other"
    assert not (folder(tmp_path, "sft") / "model.pt").exists() or kind == "torn"
    text = commands(tmp_path, *argv)
    assert ("going on at step" in text) == (kind != "torn")
    for stage in ("sft", "groups", "dpo"):
        same(folder(tmp_path, stage), folder(one, stage))


def test_an_error_of_all_ranks_is_printed_once(tmp_path):
    ended = pair(tmp_path, lambda rank: train_py(["--groups", "/none.jsonl", "--device", "cpu"]))
    assert [code for code, _ in ended] == [2, 1], "rank 0 reads first and prints the error"
    text = "".join(text for _, text in ended)
    assert text.count("error: cannot read /none.jsonl") == 1 and "Traceback" not in text


@pytest.mark.parametrize("faulty", [0, 1])
def test_if_one_rank_fails_only_that_rank_prints_an_error(tmp_path, faulty):
    def work(rank):
        def main():
            ranks.start(False)
            if rank == faulty:
                raise UserError("its disk is full")
            ranks.add_up([torch.ones(3)])  # waits for all ranks

        return main_exit(main)

    ended = pair(tmp_path, work)
    assert ended[faulty] == (2, "error: its disk is full\n")
    assert ended[1 - faulty][0] != 0 and "Error" not in ended[1 - faulty][1]


@pytest.mark.parametrize("stage", ["ppo", "frontier", "inspect", "degenerate"])
def test_a_stage_for_one_process_is_refused_under_torchrun(tmp_path, stage):
    ended = pair(tmp_path, lambda rank: train_py(["--stage", stage, "--device", "cpu"]))
    assert [code for code, _ in ended] == [2, 2]
    text, = filter(None, (text for _, text in ended))
    assert text.startswith(f"error: --stage {stage} runs in one process") and text.count("\n") == 1


def test_ranks_with_different_memory_sample_the_same_parts(tmp_path, job):
    model, prompts = job.policy("sft"), [[job.data.eot, i] for i in range(1, 41)]
    alone = job.sample(model, prompts, seed=1)

    def work(rank):
        ranks.start(False)
        job.memory = lambda: (700_000, 500_000)[rank]
        assert job.batch_size(model) < 20
        assert job.sample(model, prompts, seed=1) == alone
        return 0

    assert pair(tmp_path, work) == [(0, "")] * 2


def test_a_step_may_have_fewer_micro_batches_than_ranks(tmp_path, data):
    argv = [*TINY, "--data", data, "--dpo-batch", 1, "--dropout", 0]
    assert command(*argv, "--out", tmp_path / "one").code == 0
    commands(tmp_path, *argv, "--out", tmp_path / "two")
    a, b = ([row["loss"] for row in read_rows(folder(tmp_path / n, "dpo") / "metrics.jsonl")
             if "loss" in row] for n in ("one", "two"))
    assert a == pytest.approx(b, rel=1e-4)


def test_each_rank_has_a_gpu(monkeypatch):
    taken = []
    monkeypatch.setattr(ranks, "WORLD", 4)
    for name, stand_in in dict(is_available=lambda: True, device_count=lambda: 2,
                               is_bf16_supported=lambda _: True, set_device=taken.append).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "LOCAL_RANK", rank)
        Job("toy", PRESETS["toy"], [])
    assert taken == [0, 1]
    monkeypatch.setattr(ranks, "LOCAL_RANK", 2)
    with pytest.raises(UserError, match="--nproc_per_node 2"):
        Job("toy", PRESETS["toy"], [])


# ------------------------------------------------------------------------------ the functions


def test_results_of_all_ranks_are_in_the_order_of_the_parts(tmp_path):
    def work(rank):
        ranks.start(False)
        for n in range(6):
            done = [10 * part for part in ranks.share(range(n))]
            assert ranks.together(done) == [10 * part for part in range(n)]
        x = torch.tensor([1.0, rank])
        ranks.add_up([x, y := torch.full((3,), 2.0 * rank)])
        assert x.tolist() == [2, 1] and y.tolist() == [2] * 3
        ranks.stop()
        return 0

    assert [code for code, _ in pair(tmp_path, work)] == [0, 0]


def test_rank_0_goes_first_and_only_rank_0_writes(tmp_path):
    made = tmp_path / "run" / "model.pt"

    def work(rank):
        ranks.start(False)
        with ranks.rank_0_first():
            if rank:
                assert (tmp_path / "data").exists()
            else:
                time.sleep(0.3)
                (tmp_path / "data").touch()
        run = Run(made.parent, {}, {})
        with run:
            run.log(dict(step=0, rank=rank))
            run.checkpoint(dict(step=1, rank=rank))
            run.finish(dict(rank=rank))
        assert torch.load(made) == dict(rank=0) and run.hash
        return 0

    ended = pair(tmp_path, work)
    assert ended == [(0, "")] * 2
    assert read_rows(made.parent / "metrics.jsonl") == [dict(step=0, rank=0)]


def test_without_torchrun_the_functions_change_nothing():
    ranks.start(False)
    assert ranks.share([1, 2, 3]) == ranks.together([1, 2, 3]) == [1, 2, 3]
    ranks.add_up([x := torch.ones(2)])
    assert x.tolist() == [1, 1] and ranks.first_to_fail() and not dist.is_initialized()
    with ranks.rank_0_first():
        ranks.wait()
    ranks.stop()


# ------------------------------------------------------------------------------ torchrun itself


def test_torchrun_runs_train_py_and_its_error_is_printed_once(tmp_path, data):
    """SFT is made. Then DPO diverges, because its learning rate is too large."""
    argv = (*TINY, "--out", tmp_path, "--data", data, "--dpo-lr", "1e30", "--grad-clip", "0")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "train.py", *map(str, argv)], capture_output=True, text=True,
        cwd=Path(__file__).parents[1])
    assert ended.stdout.count("sft: done in") == ended.stdout.count("dpo: making") == 1
    assert ended.returncode == 1 and ended.stderr.count("error: dpo: ") == 1, ended.stderr
    assert (folder(tmp_path, "groups") / "ref_logps.pt").exists()
