"""Laws of pipeline.py: what is finished is found, what was killed goes on to the same weights, what
has changed is refused, and every mistake of a user is one sentence and exit code 2."""

import fcntl
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import TINY, command, folder, in_child, refused, train_py

import data_imdb
import dpo
import pipeline
import plot_frontier
import stages
from gpt import GPT, GPTConfig
from support import runs, toy_reviews
from support.runs import Run, file_hash, load_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
ROOT = Path(pipeline.__file__).parent
CLOCK = ("tokens_per_s", "targets_per_s", "pairs_per_s", "groups_per_s", "mfu", "seconds")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_clock(obj):
    if isinstance(obj, dict):
        return {k: without_clock(v) for k, v in obj.items() if k not in CLOCK}
    return obj


def contents(run: Path) -> dict:
    """Everything that a run has made, but for how long it took."""
    made = {}
    for path in run.iterdir():
        if path.name == "metrics.jsonl":
            made[path.name] = [without_clock(row) for row in lines(path)]
        elif path.name in ("result.json", "reference.json", "report.json"):
            made[path.name] = without_clock(json.loads(path.read_text()))
        elif path.suffix in (".pt", ".jsonl", ".txt", ".tiktoken"):
            made[path.name] = path.read_bytes()
        elif path.name not in (".lock", "config.json", "curves.png"):
            made[path.name] = "?"  # what should not be there
    return made


def same(run: Path, other: Path) -> None:
    a, b = contents(run), contents(other)
    if not a.get("metrics.jsonl"):
        a.pop("metrics.jsonl", 0), b.pop("metrics.jsonl", 0)  # a stage that logs nothing
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], f"{name} of {run.name} differs from that of a run never stopped"


# ------------------------------------------------------------------------------ found


def test_what_is_finished_is_found_and_nothing_is_written(chain):
    files = {path: path.stat().st_mtime_ns for path in chain.out.rglob("*") if path.is_file()}
    for extra in [], ["--precision", "fp32"], ["--save-secs", 0]:
        result = command(*TINY, *extra, "--out", chain.out, "--data", chain.data)
        assert result.code == 0, result.err
        assert re.findall(r"^(\w+): found in", result.out, re.M) == ["sft", "groups", "dpo"]
        assert "making" not in result.out
        table = chain.text[chain.text.index("reward r*") : chain.text.index("more samples")]
        assert table in result.out, "another table"
    assert files == {path: path.stat().st_mtime_ns for path in chain.out.rglob("*")
                     if path.is_file()}, "something was computed again"


def test_the_first_lines_say_what_is_made_and_why(chain):
    said = chain.text.splitlines()
    assert said[0] == "preset toy (--preset); stage dpo"
    made = [line for line in said if ": making " in line]
    assert [line.split(":")[0] for line in made] == ["sft", "groups", "dpo"]
    assert made[0].endswith(", which dpo needs") and not made[2].endswith("needs")
    assert re.search(r"^\d+ s in all$", chain.text, re.M)


def test_a_bare_command_chooses_toy_without_cuda(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "build", lambda ctx, stage, wanted: print(ctx.root, stage))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(pipeline.STAGES, "dpo", pipeline.STAGES["dpo"]._replace(report=None))
    out = command().out
    assert "preset toy (on a CPU" in out and "out/toy dpo" in out


def test_another_setting_is_another_folder(chain, copied):
    out = copied("sft", "groups", "dpo")
    argv = [*TINY, "--out", out, "--data", chain.data]
    result = command(*argv, "--beta", 0.1, "--weight", "constant", "--dpo-steps", 2)
    assert result.code == 0, result.err
    assert result.out.count("found in") == 2, "sft and groups know nothing of beta"
    names = sorted(f.name for f in (out / "toy").glob("dpo*"))
    assert len(names) == 2 and any("constant-beta0.1" in name for name in names), names
    same(out / "toy" / folder(chain.out, "dpo").name, folder(chain.out, "dpo"))
    result = command(*argv, "--seed", 1, "--stage", "sft")
    assert "making" in result.out and len(list((out / "toy").glob("sft*"))) == 2


# ------------------------------------------------------------------------------ killed


def dying(argv, kind, name="", n=1) -> None:
    """Run train.py in a child that kills itself with -9: after the n-th line logged, the n-th call
    to sample, halfway through the n-th write of a file, or right after that file is in place."""
    calls = []

    def count(key) -> bool:
        calls.append(key)
        return calls.count(key) == n

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        log, write, sample = Run.log, runs.write_whole, GPT.sample

        def killing_write(path, fill):
            mine = Path(path).name == name and count("write")

            def half(file):
                buffer = io.BytesIO()
                fill(buffer)
                file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
                file.flush()
                kill()

            write(path, half if mine and kind == "torn" else fill)
            if mine:
                kill()

        if kind == "log":
            Run.log = lambda self, row: (log(self, row), count("log") and kill())
        elif kind == "sample":
            GPT.sample = lambda *a, **k: kill() if count("sample") else sample(*a, **k)
        else:
            for module in runs, stages, data_imdb, plot_frontier:
                module.write_whole = killing_write
        return train_py(argv)

    code, text = in_child(work)
    assert code == -signal.SIGKILL, f"was to die by {kind} {name} {n}, ended with {code}: {text}"


def killed_and_finished(argv, deaths):
    for death in deaths:
        dying([*argv, "--save-secs", 0], *death)
    result = command(*argv)
    assert result.code == 0, result.err
    return result


def test_killed_while_the_corpus_is_built_and_in_sft(chain, tmp_path):
    argv = [*TINY, "--stage", "sft", "--out", tmp_path / "out", "--data", tmp_path / "data"]
    result = killed_and_finished(argv, [
        ("torn", "bpe.tiktoken"), ("torn", "train.npy"), ("torn", "about.json"), ("log",),
        ("torn", "resume.pt", 2), ("log", "", 4), ("after", "resume.pt", 2), ("torn", "model.pt")])
    same(folder(tmp_path / "out", "sft"), folder(chain.out, "sft"))
    assert "making" in result.out
    dying([*argv, "--sft-steps", 2], "after", "model.pt")  # finished, and resume.pt still there
    assert "found in" in command(*argv, "--sft-steps", 2).out


def test_killed_while_sampling(chain, copied, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Context, "rows", lambda self: 10)
    monkeypatch.setattr(stages, "CHUNK", 40)  # 5 chunks of 40 completions
    argv, out = [*TINY, "--stage", "groups", "--data", chain.data, "--out"], copied("sft")
    shutil.copytree(out, tmp_path / "whole")
    assert command(*argv, tmp_path / "whole").code == 0
    killed_and_finished([*argv, out], [
        ("sample", "", 2), ("torn", "resume.pt", 2), ("after", "resume.pt"), ("sample", "", 2),
        ("torn", "reference.json"), ("torn", "groups.jsonl"), ("torn", "ref_logps.pt")])
    same(folder(out, "groups"), folder(tmp_path / "whole", "groups"))


def test_killed_in_dpo(chain, copied):
    out = copied("sft", "groups")
    killed_and_finished([*TINY, "--data", chain.data, "--out", out], [
        ("log",), ("torn", "resume.pt", 2), ("log", "", 3), ("after", "resume.pt", 2), ("sample",),
        ("torn", "result.json"), ("torn", "model.pt")])
    same(folder(out, "dpo"), folder(chain.out, "dpo"))


# ------------------------------------------------------------------------------ Ctrl-C


def interrupted(argv, n, times=1):
    """Ctrl-C, once or twice, after the n-th line logged."""
    def work():
        log, calls = Run.log, []

        def log_and_interrupt(self, row):
            log(self, row)
            calls.append(row)
            if len(calls) == n:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)

        Run.log = log_and_interrupt
        return train_py(argv)

    return in_child(work)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_ctrl_c_saves_and_the_same_command_goes_on(chain, copied, stage):
    out = copied(*[] if stage == "sft" else ["sft", "groups"])
    argv = [*TINY, "--stage", stage, "--data", chain.data, "--out", out]
    code, text = interrupted(argv, 3)
    assert code == 130 and "Traceback" not in text, text
    assert re.search(rf"stopped: {stage} is saved at step [23] of \d; the same command goes", text)
    code, text = interrupted(argv, 2)
    assert code == 130 and "going on at step" in text, text
    assert command(*argv).code == 0
    same(folder(out, stage), folder(chain.out, stage))


def test_ctrl_c_twice_stops_at_once(chain, tmp_path):
    argv = [*TINY, "--stage", "sft", "--data", chain.data, "--out", tmp_path]
    code, text = interrupted([*argv, "--save-secs", 0], 3, times=2)
    assert code == 130 and "Traceback" not in text and "from the last checkpoint" in text, text
    assert command(*argv).code == 0
    same(folder(tmp_path, "sft"), folder(chain.out, "sft"))


def test_ctrl_c_while_sampling(chain, copied, monkeypatch):
    monkeypatch.setattr(stages.Context, "rows", lambda self: 10)
    monkeypatch.setattr(stages, "CHUNK", 40)
    sample, out = GPT.sample, copied("sft")

    def stopping(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return sample(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "sample", stopping)
        result = command(*TINY, "--stage", "groups", "--data", chain.data, "--out", out)
    assert result.code == 130, result.err
    assert "stopped: 40 of 192 completions are saved; the same command goes on" in result.err
    assert command(*TINY, "--stage", "groups", "--data", chain.data, "--out", out).code == 0


DIES = '''
import os, signal
calls = []

def weight(margin, beta):
    calls.append(0)
    name, n = os.environ.get("DIES", "SIGKILL 0").split()
    if len(calls) == int(n):
        os.kill(os.getpid(), getattr(signal, name))
    return (-margin).sigmoid()
'''


def test_the_real_command_killed_and_interrupted(chain, copied, tmp_path):
    """python train.py itself, stopped in the middle of a step by the --weight that it runs."""
    (tmp_path / "w.py").write_text(DIES)
    argv = [*TINY, "--weight", f"{tmp_path / 'w.py'}:weight", "--data", str(chain.data), "--out"]
    out = copied("sft", "groups")
    shutil.copytree(out, tmp_path / "whole")
    results = []
    for signal_name, call in (("SIGKILL", 8), ("SIGINT", 5)):
        results.append(subprocess.run(
            [sys.executable, "train.py", *argv, str(out), "--save-secs", "0"], cwd=ROOT, text=True,
            capture_output=True, timeout=100, env={**os.environ, "DIES": f"{signal_name} {call}"}))
    assert results[0].returncode == -signal.SIGKILL, results[0].stderr
    assert results[1].returncode == 130, results[1].stderr
    assert "going on at step 2 of 6" in results[1].stdout and "found in" in results[1].stdout
    assert "the same command goes on" in results[1].stderr
    assert "Traceback" not in results[1].stderr and "%|" not in results[1].stderr, "a bar in a pipe"
    assert command(*argv, out).code == command(*argv, tmp_path / "whole").code == 0
    same(folder(out, "dpo"), folder(tmp_path / "whole", "dpo"))


# ------------------------------------------------------------------------------ refused


def test_a_changed_parent_is_refused_and_nothing_overwritten(chain, copied):
    out = copied("sft", "groups", "dpo")
    shutil.copy(folder(out, "dpo") / "model.pt", folder(out, "sft") / "model.pt")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    refused(command(*TINY, "--out", out, "--data", chain.data),
            "sft has changed since", folder(out, "groups"), "delete", "restore sft")
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_truncated_checkpoint_is_refused(chain, copied):
    out = copied("sft")
    path = folder(out, "sft") / "model.pt"
    path.write_bytes(path.read_bytes()[:5000])
    refused(command(*TINY, "--out", out, "--data", chain.data), path, "truncated", "delete it")
    path.write_bytes(b"")
    shutil.rmtree(folder(out, "groups"))
    refused(command(*TINY, "--out", out, "--data", chain.data), path, "truncated")
    path.unlink()
    resume = path.with_name("resume.pt")
    resume.write_bytes((folder(chain.out, "sft") / "model.pt").read_bytes()[:5000])
    refused(command(*TINY, "--out", out, "--data", chain.data), resume, "truncated")


@pytest.mark.parametrize("name, file", [("groups", "reference.json"), ("dpo", "result.json")])
def test_a_small_file_that_is_gone_is_one_sentence(chain, copied, name, file):
    out = copied("sft", "groups", "dpo")
    (folder(out, name) / file).unlink()
    if name == "groups":  # a finished dpo reads no groups to train
        (folder(out, "dpo") / "model.pt").unlink()
    refused(command(*TINY, "--out", out, "--data", chain.data), file, "delete",
            folder(out, name), "run the stage again")


@pytest.mark.parametrize("stage, parents", [("groups", ["sft"]), ("ppo-gt", ["sft", "groups"])])
def test_the_checkpoint_of_another_stage_is_refused(chain, copied, stage, parents):
    out = copied(*parents)
    command("--stage", stage, *TINY, "--out", out, "--data", chain.data)
    place = folder(out, stage)
    (place / ("ref_logps.pt" if stage == "groups" else "model.pt")).unlink()
    torch.save(dict(step=1, other=2), place / "resume.pt")
    refused(command("--stage", stage, *TINY, "--out", out, "--data", chain.data), "resume.pt",
            "another configuration", "delete")


@pytest.mark.parametrize("config, words", [
    (GPTConfig(1280, 48, 1, 2, 16), ("1280 tokens", "--vocab")),
    (GPTConfig(0, 32, 1, 2, 16), ("context of 32", "--n-ctx 32"))])
def test_a_checkpoint_of_another_configuration_is_refused(chain, copied, config, words):
    out = copied("sft")
    path = folder(out, "sft") / "model.pt"
    size = config.vocab_size or GPT.load(path).config.vocab_size
    torch.save(GPT(GPTConfig(**vars(config) | {"vocab_size": size})).saved(), path)
    refused(command(*TINY, "--out", out, "--data", chain.data), path, *words)
    shutil.rmtree(folder(out, "groups"))
    torch.save({"model": {}}, path)
    refused(command(*TINY, "--out", out, "--data", chain.data), path, "no GPT")


def test_a_folder_of_other_settings_is_refused(chain, copied):
    out = copied("sft")
    config = folder(out, "sft") / "config.json"
    config.write_text(config.read_text().replace('"sft_lr": 0.006', '"sft_lr": 0.5'))
    refused(command(*TINY, "--out", out, "--data", chain.data), "sft_lr = 0.5", "sft_lr = 0.006",
            "--out")


@pytest.mark.parametrize("flag", ["--out", "--data"])
def test_a_folder_that_cannot_be_written(chain, tmp_path, flag):
    (tmp_path / "file").write_text("in the place of a folder")
    places = {"--out": tmp_path / "out", "--data": chain.data, flag: tmp_path / "file"}
    refused(command(*TINY, *(x for item in places.items() for x in item)),
            "cannot write", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the place of a folder"


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(chain, tmp_path):
    """The kernel's own refusal: no file may grow past 20 kB, and a checkpoint has more."""
    argv = [*TINY, "--stage", "sft", "--out", tmp_path, "--data", chain.data]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        result = command(*argv, "--save-secs", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused(result, "cannot write", "resume.pt", "free some space", "again")
    assert not [p for p in folder(tmp_path, "sft").iterdir() if p.suffix == ".tmp"]
    assert command(*argv).code == 0
    same(folder(tmp_path, "sft"), folder(chain.out, "sft"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_absent(tmp_path):
    refused(command(*TINY, "--device", "cuda", "--out", tmp_path / "out"), "--device cuda", "CUDA")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["sft", "groups", "dpo"])
def test_the_second_of_two_processes_is_refused(chain, copied, stage):
    out = copied("sft", "groups", "dpo")
    run = folder(out, stage)
    (run / pipeline.STAGES[stage].final).unlink()  # as if still at work
    before = contents(run)
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(command(*TINY, "--stage", stage, "--out", out, "--data", chain.data),
                run, "in use by another process")
    assert contents(run) == before, "the second process has written"


def test_stages_that_do_not_apply_say_so(chain, tmp_path):
    place = ["--out", tmp_path, "--data", chain.data]
    refused(command(*TINY, *place, "--stage", "reward"), "exact", "--stage dpo")
    refused(command(*TINY, *place, "--stage", "chosen"), "--groups FILE")
    assert not list(tmp_path.iterdir())


def test_a_judge_that_is_not_installed_is_missed_before_sampling(chain, copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(GPT, "sample", None)
    argv = [*TINY, "--reward", "siebert", "--out", copied("sft"), "--data", chain.data]
    refused(command(*argv), "siebert", "pip install transformers")


def test_too_large_a_batch_and_no_difference_in_reward(chain, tmp_path, monkeypatch):
    place = ["--out", tmp_path, "--data", chain.data]
    refused(command(*TINY, *place, "--sft-batch", 9999), "--sft-batch")
    monkeypatch.setattr(stages.ToyReward, "__call__", lambda self, p, c: torch.ones(len(p)))
    refused(command(*TINY, *place, "--stage", "groups"), "same reward")


def test_a_loss_that_is_not_finite(chain, copied):
    """The step, the last good checkpoint and what to try; and the same command goes on from it."""
    out = copied("sft", "groups")
    argv = [*TINY, "--out", out, "--data", chain.data]
    with pytest.MonkeyPatch.context() as patch:
        loss, calls = dpo.dpo_loss, []

        def diverging(*args):
            calls.append(0)
            losses, rewards = loss(*args)
            return losses * (math.nan if len(calls) == 4 else 1), rewards

        patch.setattr(dpo, "dpo_loss", diverging)
        result = command(*argv, "--save-secs", 0)
    refused(result, "not finite at step 3", "checkpoint is step 3",
            folder(out, "dpo") / "resume.pt", "--dpo-lr")
    assert "going on at step 3" in command(*argv).out
    same(folder(out, "dpo"), folder(chain.out, "dpo"))


# ------------------------------------------------------------------------------ a user's code


@pytest.fixture
def own_dpo(monkeypatch):
    """--dpo-module replaces functions of dpo.py for the process: put them back."""
    for name, value in vars(dpo).items():
        if not name.startswith("__"):
            monkeypatch.setattr(dpo, name, value)


def test_a_weight_of_ones_own_is_part_of_the_identity(chain, copied, tmp_path):
    out, path = copied("sft", "groups"), tmp_path / "mine.py"
    argv = [*TINY, "--weight", f"{path}:half", "--out", out, "--data", chain.data]
    path.write_text("def half(margin, beta):\n    return 0 * margin + 0.5\n")
    assert command(*argv).code == 0
    run = folder(out, "dpo")
    assert run.name != folder(chain.out, "dpo").name
    assert json.loads((run / "config.json").read_text())["parents"][str(path)] == file_hash(path)
    rows = lines(run / "metrics.jsonl")
    assert {r["weight"] for r in rows if "weight" in r} == {0.5}
    assert "dpo: found in" in command(*argv).out
    path.write_text("def half(margin, beta):\n    return 0 * margin + 0.25\n")
    refused(command(*argv), path, "has changed since")
    for code, word in (("def half(margin):\n    return margin", "must take (margin, beta)"),
                       ("def half(margin, beta):\n    return 1.0", "shape"),
                       ("def half(margin, beta):\n    return margin / 0", "finite"),
                       ("def other(margin, beta):\n    return margin", "half"),
                       ("def half(margin, beta)", "cannot import")):
        shutil.rmtree(run, ignore_errors=True)
        path.write_text(code + "\n")
        refused(command(*argv), path, word)


MINE = """
import torch.nn.functional as F

def dpo_loss(pi_logps, ref_logps, yw_idxs, yl_idxs, beta):
    rewards = beta * (pi_logps - REF)
    margin = rewards[yw_idxs] - rewards[yl_idxs]
    return -F.logsigmoid(margin), rewards.detach()
"""


def test_a_students_file_trains_as_dpo_does(chain, copied, tmp_path, own_dpo):
    out, path = copied("sft", "groups"), tmp_path / "mine.py"
    path.write_text(MINE.replace("REF", "ref_logps"))
    argv = [*TINY, "--dpo-module", path, "--out", out, "--data", chain.data]
    result = command(*argv)
    assert result.code == 0, result.err
    assert dpo.dpo_loss.__code__.co_filename == str(path), "the file's function was not used"
    mine, theirs = (load_tensors(folder(o, "dpo") / "model.pt")["model"] for o in (out, chain.out))
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=1e-4), name
    path.write_text(MINE.replace("REF", "ref_logps").replace("-F.", "-1.0 * F."))
    refused(command(*argv), path, "has changed since")


def test_a_students_mistake_is_caught_at_the_start(chain, copied, tmp_path, own_dpo):
    out, path = copied("sft", "groups"), tmp_path / "mine.py"
    argv = [*TINY, "--dpo-module", path, "--out", out, "--data", chain.data]
    path.write_text(MINE.replace("REF", "0"))  # π_ref forgotten
    refused(command(*argv), "the first loss is", "log 2")
    path.write_text(MINE.replace(", beta)", ")").replace("REF", "ref_logps"))
    refused(command(*argv), path, "dpo_loss must take")
    path.write_text("def no_such_name():\n    pass\n")
    refused(command(*argv), path, "no function of dpo.py")


# ------------------------------------------------------------------------------ others' pairs


def rows_of_pairs(n=30, hh=False):
    """Praise chosen over blame, in the toy corpus's own words."""
    for i in range(n):
        subject = f"the {('acting', 'plot', 'music', 'script', 'camera')[i % 5]} of film {i}"
        good = f" was {('superb', 'witty')[i % 2]}."
        bad = f" was {('dull', 'messy')[i % 2]}, I fear."
        if hh:
            head = f"\n\nHuman: {i}?\n\nAssistant:"
            yield {"chosen": head + good, "rejected": head + bad}
        else:
            yield {"prompt": subject, "chosen": good, "rejected": bad}


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_other_peoples_preferences(chain, copied, tmp_path):
    """π_ref is first fine-tuned on what was chosen; a tenth of the prompts is held out; "-" where
    there is no r*; what does not fit the context is left out and counted."""
    long = {"prompt": "x", "chosen": "a " * 60, "rejected": "b"}
    path, out = write(tmp_path / "my.jsonl", [*rows_of_pairs(), long]), copied("sft")
    argv = [*TINY, "--sft-batch", 8, "--groups", path, "--out", out, "--data", chain.data]
    for death in ("log",), ("torn", "resume.pt"), ("torn", "groups.jsonl"), ("log", "", 4):
        dying([*argv, "--save-secs", 0], *death)
    result = command(*argv)
    assert result.code == 0, result.err
    assert command(*argv[:-4], "--out", tmp_path / "whole", *argv[-2:]).code == 0
    for stage in "chosen", "groups", "dpo":
        same(folder(out, stage), folder(tmp_path / "whole", stage))
    for name in "π_ref", "π_θ, β 0.5", "optimum":
        (line,) = [x for x in result.out.splitlines() if x.startswith(name)]
        cells = line[20:].split("  ")
        assert [c for c in cells if c.strip()][0].strip() == "-", f"a reward where none is: {line}"
    text = (folder(out, "dpo") / "samples.txt").read_text()
    assert "r* - |" in text and text.count("prompt:") == 3, "30 prompts hold out 3"
    made = lines(folder(out, "groups") / "groups.jsonl")
    assert len(made) == 30 and made[0]["rewards"] is None
    reference = json.loads((folder(out, "groups") / "reference.json").read_text())
    assert reference["notes"] == {"longer than 48 tokens": 1} and reference["optimum"] == []
    assert reference["point"]["reward"] is None
    result = json.loads((folder(out, "dpo") / "result.json").read_text())
    assert 0 <= result["accuracy"] <= 1 and result["kl"] > 0 and result["reward"] is None
    parents = json.loads((folder(out, "groups") / "config.json").read_text())["parents"]
    assert parents[str(path)] == file_hash(path)
    write(path, list(rows_of_pairs(29)))
    refused(command(*argv), path, "has changed since")


def test_the_chosen_reference_likes_what_was_chosen(chain, copied, tmp_path):
    path = write(tmp_path / "my.jsonl", rows_of_pairs(40))
    result = command(*TINY, "--stage", "chosen", "--sft-lr", 0.5, "--sft-warmup", 0, "--sft-batch",
                     4, "--groups", path, "--out", tmp_path / "out", "--data", chain.data,
                     "--sft-steps", 1)
    assert result.code == 0, result.err
    run = folder(tmp_path / "out", "chosen")
    losses = [row["loss"] for row in lines(run / "metrics.jsonl")]
    assert len(losses) == 9, "one pass over 36 prompts, 4 at a time"
    assert losses[-1] < losses[0] - 0.5, losses


def test_hh_with_a_reference_of_ones_own(chain, tmp_path):
    """A run and a Hugging Face folder of the same weights are the same π_ref; no SFT is made."""
    path = write(tmp_path / "hh.jsonl", rows_of_pairs(hh=True))
    sft = folder(chain.out, "sft")
    GPT.load(sft / "model.pt").save_pretrained(tmp_path / "hf")
    logps = []
    for name, reference in ("run", sft), ("hf", tmp_path / "hf"):
        result = command(*TINY, "--groups", path, "--reference", reference, "--data", chain.data,
                         "--out", tmp_path / name, "--dpo-steps", 2)
        assert result.code == 0, result.err
        made = {f.name.split("-")[0] for f in (tmp_path / name / "toy").iterdir()}
        assert made == {"groups", "dpo"}
        run = folder(tmp_path / name, "groups")
        logps.append(load_tensors(run / "ref_logps.pt")["ref_logps"])
        weights = reference / ("model.pt" if name == "run" else "model.safetensors")
        parents = json.loads((run / "config.json").read_text())["parents"]
        assert parents[str(reference)] == file_hash(weights)
        row = lines(run / "groups.jsonl")[0]
        assert row["prompt"].startswith("\n\nHuman: 0?") and row["prompt"].endswith("Assistant:")
    assert torch.allclose(*logps, atol=1e-5)


def test_a_reference_that_does_not_fit_is_refused(chain, tmp_path):
    path = write(tmp_path / "my.jsonl", rows_of_pairs())
    n_vocab = GPT.load(folder(chain.out, "sft") / "model.pt").config.vocab_size

    def with_reference(reference):
        return command(*TINY, "--groups", path, "--reference", reference, "--data", chain.data,
                       "--out", tmp_path / "out")

    for name, vocab, n_ctx, words in (("vocab", 50257, 48, ("50257 tokens", str(n_vocab))),
                                      ("ctx", n_vocab, 32, ("context of 32", "--n-ctx 32"))):
        GPT(GPTConfig(vocab, n_ctx, 1, 2, 16)).save_pretrained(tmp_path / name)
        refused(with_reference(tmp_path / name), tmp_path / name, *words)
        shutil.rmtree(tmp_path / "out")
    weights = tmp_path / "ctx" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    refused(with_reference(tmp_path / "ctx"), "truncated")
    refused(with_reference(tmp_path / "nowhere"), "nowhere", "--reference")
    refused(with_reference(tmp_path), tmp_path, "no run")


PAIR = {"prompt": "this film", "chosen": " is good", "rejected": " is bad"}
OURS = {"prompt": "film", "completions": [" a", " b"], "rewards": [1, 0], "prompt_ids": [5, 6],
        "completion_ids": [[7], [8]]}
BAD = {
    "malformed JSON": ([PAIR, '{"prompt": "this', PAIR], "line 2", "JSON"),
    "an empty completion": ([PAIR, PAIR, PAIR | {"rejected": " "}], "line 3", "empty"),
    "an id beyond the vocabulary": ([OURS, OURS | {"completion_ids": [[7], [99_999]]}], "line 2",
                                    "99999"),
    "equal rewards only": ([OURS | {"rewards": [1, 1]}] * 3, "no group to learn from"),
    "nothing left after dropping": ([PAIR | {"chosen": "long " * 99}] * 3, "longer than 48 tokens"),
    "prompts past the context": ([PAIR | {"prompt": "long " * 99}] * 3, "longer than 48 tokens"),
    "an empty file": ([], "no group to learn from"),
    "a single prompt": ([PAIR, PAIR], "1 distinct prompts; three are needed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_preference_file_is_one_sentence(chain, copied, tmp_path, case):
    rows, *words = BAD[case]
    path = write(tmp_path / "my.jsonl", rows)
    refused(command(*TINY, "--groups", path, "--out", copied("sft"), "--data", chain.data), *words)


def test_a_preference_file_that_is_not_there_is_missed_before_sft(chain, tmp_path):
    refused(command(*TINY, "--groups", tmp_path / "nowhere.jsonl", "--out", tmp_path / "out",
                    "--data", chain.data), "cannot read", "nowhere.jsonl")
    assert not (tmp_path / "out").exists()


def test_the_fewest_preferences_have_an_error_bar(chain, copied, tmp_path):
    """Three prompts, two of them held out: no NaN, which is no JSON, in any file."""
    path, out = write(tmp_path / "my.jsonl", [PAIR | {"prompt": x} for x in "abc"]), copied("sft")
    result = command(*TINY, "--groups", path, "--out", out, "--data", chain.data, "--dpo-batch", 1,
                     "--sft-batch", 1)
    assert result.code == 0, result.err
    for file in [*out.rglob("*.json"), *out.rglob("*.jsonl")]:
        assert "NaN" not in file.read_text(), file
    assert "nan" not in result.out.lower()


# ------------------------------------------------------------------------------ imdb


IMDB = ("--preset imdb --device cpu --threads 1 --vocab 600 --n-layer 1 --n-head 2 --n-embd 16 "
        "--n-ctx 64 --sft-steps 3 --sft-batch 8 --sft-warmup 1 --reward-steps 4 --reward-batch 4 "
        "--reward-ctx 40 --max-new 24 --prompts 30 --eval-prompts 8 --optimum 4 --dpo-steps 3 "
        "--dpo-warmup 1 --dpo-batch 5").split()


@pytest.fixture(scope="module")
def imdb(tmp_path_factory):
    """A small archive of the real one's layout, its reviews the toy's; the counts cut to match."""
    base = tmp_path_factory.mktemp("imdb")
    few = {key: (split, label, 40) for key, (split, label, _) in data_imdb.FOLDERS.items()}
    texts = list(dict.fromkeys(toy_reviews.reviews(900, 5)))
    pools = {1: [t for t in texts if toy_reviews.sentiment(t) > 0.5],
             0: [t for t in texts if toy_reviews.sentiment(t) < 0.5]}
    with tarfile.open(base / "aclImdb.tar.gz", "w:gz") as archive:
        for key, (_, label, n) in few.items():
            for i in range(n):
                pool = pools[i % 2 if label is None else label]
                member = tarfile.TarInfo(f"aclImdb/{key}/{i}_{9 if label else 2}.txt")
                content = (pool.pop() + "<br />" + pool.pop()).encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_imdb, "FOLDERS", few)
        patch.setenv("IMDB_PATH", str(base / "aclImdb.tar.gz"))
        result = command(*IMDB, "--out", base / "out", "--data", base / "data")
        assert result.code == 0, result.err
        yield base / "out", base / "data", result.out


def test_imdb_runs_end_to_end(imdb):
    out, _, text = imdb
    made = re.findall(r"^(\w+): making", text, re.M)
    assert made == ["sft", "reward", "groups", "dpo"] and "preset imdb (--preset)" in text
    rewards = [row["rewards"] for row in lines(folder(out, "groups") / "groups.jsonl")]
    assert all(0 <= r <= 1 for row in rewards for r in row)
    result = json.loads((folder(out, "dpo") / "result.json").read_text())
    assert 0 <= result["reward"] <= 1 and result["grammatical"] is None
    (line,) = [x for x in text.splitlines() if x.startswith("π_θ")]
    assert f"{result['reward']:.3f}" in line and "- " in line, "grammar is the toy's alone"
    parents = json.loads((folder(out, "groups") / "config.json").read_text())["parents"]
    assert parents.keys() == {"sft", "reward", "data"}


def test_the_judge_reports_how_well_it_judges(imdb):
    out, data, _ = imdb
    result = command(*IMDB, "--stage", "reward", "--out", out, "--data", data)
    assert result.code == 0 and "reward: found in" in result.out
    report = json.loads((folder(out, "reward") / "report.json").read_text())
    assert report.keys() == {"valid_whole", "valid_crop", "test_whole", "test_crop"}
    for name, row in report.items():
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["calibration_error"] <= 1
        assert f"r* on {name.replace('_', ', ')}: accuracy {row['accuracy']:.3f}" in result.out
    rows = lines(folder(out, "reward") / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "an indifferent start"


def test_killed_while_r_is_trained(imdb, tmp_path):
    out, data, _ = imdb
    shutil.copytree(folder(out, "sft"), tmp_path / "imdb" / folder(out, "sft").name)
    killed_and_finished([*IMDB, "--stage", "reward", "--data", data, "--out", tmp_path], [
        ("log",), ("torn", "resume.pt", 2), ("log", "", 2), ("torn", "report.json"),
        ("torn", "model.pt")])
    same(folder(tmp_path, "reward"), folder(out, "reward"))


def test_imdb_without_its_corpus_is_one_sentence(tmp_path, monkeypatch):
    argv = [*IMDB, "--stage", "sft", "--out", tmp_path / "out", "--data", tmp_path / "data"]

    def no_network(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.delenv("IMDB_PATH", raising=False)
    refused(command(*argv), "cannot download", "IMDB_PATH")
    monkeypatch.setenv("IMDB_PATH", str(tmp_path / "nowhere.tar.gz"))
    refused(command(*argv), "IMDB_PATH is", "nowhere")
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b not an archive")
    monkeypatch.setenv("IMDB_PATH", str(tmp_path / "cut.tar.gz"))
    refused(command(*argv), "cannot be read as an archive")
    with tarfile.open(tmp_path / "few.tar.gz", "w:gz") as archive:
        archive.add(__file__, "aclImdb/train/pos/0_9.txt")
    monkeypatch.setenv("IMDB_PATH", str(tmp_path / "few.tar.gz"))
    refused(command(*argv), "has 0 reviews named test/pos", "wrong or incomplete archive")


def test_a_gpu_too_small_is_told_in_a_sentence(chain, copied, monkeypatch):
    def out_of_memory(ctx, run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(pipeline.STAGES, "dpo", pipeline.STAGES["dpo"]._replace(make=out_of_memory))
    result = command(*TINY, "--data", chain.data, "--out", copied("sft", "groups"))
    refused(result, "dpo, or what it needs, does not fit the GPU", "--dpo-accum")
