"""Laws of support/runs.py: a kill loses nothing, a folder keeps one identity, one process works in it."""

import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from support import runs
from support.runs import (
    Run,
    UserError,
    file_hash,
    json_hash,
    load_tensors,
    save_tensors,
    write_whole,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
SETTINGS, PARENTS = {"beta": 0.1, "layers": (2, 3)}, {"sft": "aaaa"}
ROOT = Path(runs.__file__).parents[1]


def fork(work):
    """The process id of a child that does work() and nothing else, not even pytest's clean-up."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def kill(pid):
    """kill -9; the exit status that the child had reached, or minus the signal."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk(file):
    file.write(b"half of it")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def file_limit():
    """The kernel's own refusal, without a small disk: no file may grow past 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------------ whole files

def test_write_whole_replaces_and_leaves_nothing_else(tmp_path):
    for content in b"old", b"new":
        write_whole(tmp_path / "a", lambda file: file.write(content))
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"], "a temporary file was left"


def test_bytes_are_on_disk_before_their_name_is(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def record_fsync(fd):
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["fsync file", "rename", "fsync folder"], "a power cut could empty it"


def test_write_whole_obeys_umask(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "a").stat().st_mode)
    assert mode == 0o644, f"others cannot read a finished run: mode {mode:o}"


def test_full_disk_keeps_the_old_file(tmp_path):
    write_whole(tmp_path / "a", lambda file: file.write(b"old"))
    with pytest.raises(UserError, match=r"cannot write .*/a: No space left on device; free some"):
        write_whole(tmp_path / "a", full_disk)
    assert (tmp_path / "a").read_bytes() == b"old", "a failed write damaged the old file"
    assert names(tmp_path) == ["a"], "a failed write left its temporary file on the full disk"


def test_a_bug_in_the_writer_stays_a_bug_and_keeps_the_old_file(tmp_path):
    write_whole(tmp_path / "a", lambda file: file.write(b"old"))
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "a", lambda file: 1 / 0)
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_unwritable_places_are_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in tmp_path / "missing/a", tmp_path / "file/a", tmp_path:
        with pytest.raises(UserError, match="cannot write .*again") as caught:
            write_whole(path, lambda file: file.write(b"x"))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot write .*file/run"):
        with Run(tmp_path / "file/run", SETTINGS, PARENTS):
            pass


def test_tensors_on_a_full_disk(tmp_path, file_limit):
    save_tensors(tmp_path / "a.pt", {"w": torch.ones(3)})
    with pytest.raises(UserError, match=r"cannot write .*a\.pt: File too large"):
        save_tensors(tmp_path / "a.pt", {"w": torch.ones(100_000)})
    assert load_tensors(tmp_path / "a.pt")["w"].shape == (3,), "the old checkpoint is gone"
    assert names(tmp_path) == ["a.pt"]


def test_equal_states_give_equal_bytes(tmp_path):
    for name in "a.pt", "b.pt":
        save_tensors(tmp_path / name, {"w": torch.arange(9.0), "step": 3, "betas": (0.9, 0.95)})
    assert file_hash(tmp_path / "a.pt") == file_hash(tmp_path / "b.pt"), "hashes cannot name states"
    save_tensors(tmp_path / "b.pt", {"w": torch.arange(9.0) + 1, "step": 3, "betas": (0.9, 0.95)})
    assert file_hash(tmp_path / "a.pt") != file_hash(tmp_path / "b.pt")


def test_truncated_and_foreign_tensors_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    save_tensors(path, {"w": torch.arange(1000.0)})
    whole = path.read_bytes()
    torch.save(SystemExit("not tensors"), tmp_path / "code.pt")
    foreign = b"<html>not found</html>", b"PK\3\4 not a zip", (tmp_path / "code.pt").read_bytes()
    for content in *(whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)), *foreign:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pt is truncated or not .*: restore it"):
            load_tensors(path)
    with pytest.raises(UserError, match=r"cannot read .*no\.pt: No such file"):
        load_tensors(tmp_path / "no.pt")
    with pytest.raises(UserError, match=r"cannot read .*no\.pt: No such file"):
        file_hash(tmp_path / "no.pt")


def test_json_hash_is_of_the_value():
    assert json_hash({"a": 1, "b": [2, 3]}) == json_hash({"b": (2, 3), "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": "1"})
    assert len(json_hash({})) == 16 and int(json_hash({}), 16) >= 0


def test_kill_9_during_a_write_leaves_old_or_new(tmp_path):
    """Each write is one byte value a million times over; a mixture would be a torn file."""
    path, seen, rng = tmp_path / "a", set(), random.Random(0)
    write_whole(path, lambda file: file.write(bytes(1_000_000)))

    def write_forever():
        for i in range(10**9):
            value = bytes([i % 256])
            write_whole(path, lambda file: [file.write(value * 1000) for _ in range(1000)])

    for _ in range(25):
        pid = fork(write_forever)
        time.sleep(rng.uniform(0.005, 0.04))
        assert kill(pid) == -signal.SIGKILL, "the writer ended by itself"
        content = path.read_bytes()
        assert len(content) == 1_000_000 and len(set(content)) == 1, "a kill left a torn file"
        seen.add(content[0])
    assert len(seen) > 1, "the writer never got to replace the file: the test shows nothing"
    (tmp_path / "other").write_bytes(b"")
    with Run(tmp_path, SETTINGS, PARENTS):
        assert not list(tmp_path.glob("*.tmp")), "the next run clears what killed writers left"
        assert {"a", "other"} <= set(names(tmp_path)), "and nothing else"


# ------------------------------------------------------------------------------ identity

def test_a_run_from_start_to_finish(tmp_path):
    run = Run(tmp_path / "out/run", SETTINGS, PARENTS, about={"torch": "2"})
    assert not run.finished and not run.folder.exists(), "asking must not make the folder"
    with run:
        config = json.loads(run.path("config.json").read_bytes())
        assert config == {"settings": {"beta": 0.1, "layers": [2, 3]}, "parents": PARENTS,
                          "about": {"torch": "2"}, "identity": run.identity}
        assert run.resume() is None
        run.log({"step": 0, "loss": 1.5})
        run.checkpoint({"step": 1})
        assert not run.finished
        run.finish({"w": torch.ones(2)})
    assert run.finished and run.metrics() == [{"step": 0, "loss": 1.5}]
    assert names(run.folder) == [".lock", "config.json", "metrics.jsonl", "model.pt"]
    again = Run(run.folder, {"layers": [2, 3], "beta": 0.1}, PARENTS, about={"torch": "3"})
    assert again.finished, "order of settings, list or tuple, and versions are not identity"
    with again, pytest.raises(UserError, match="was finished by another process"):
        again.resume()
    assert again.metrics(), "entering a finished run must not clear it"


def test_a_final_that_is_no_tensors(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS, final="groups.jsonl") as run:
        run.finish(lambda file: file.write(b"{}\n"))
    assert run.finished and run.path("groups.jsonl").read_bytes() == b"{}\n"


@pytest.mark.parametrize("settings, parents, message", [
    ({"beta": 0.5, "layers": (2, 4)}, PARENTS,
     r'was made with beta = 0\.1, and this command has beta = 0\.5: choose another --out, or give'),
    ({"beta": 0.1, "layers": (2, 4)}, {"sft": "bbbb"}, r"layers = \[2, 3\].* layers = \[2, 4\]"),
    ({"beta": 0.1}, PARENTS, r"layers = \[2, 3\].* layers = \(absent\)"),
    ({**SETTINGS, "new": "x"}, PARENTS, r'new = \(absent\).* new = "x"'),
    (SETTINGS, {"sft": "bbbb"},
     r'^sft has changed since .*/run was made from it \(it was "aaaa", it is "bbbb"\): delete'),
])
@pytest.mark.parametrize("finish", [False, True])
def test_another_identity_is_refused_and_never_overwritten(
        tmp_path, settings, parents, message, finish):
    with Run(tmp_path / "run", SETTINGS, PARENTS) as run:
        run.log({"step": 0})
        run.checkpoint({"step": 1})
        if finish:
            run.finish({})
    before = {name: run.path(name).read_bytes() for name in names(run.folder)}
    other = Run(tmp_path / "run", settings, parents)
    for _ in range(2):  # the lock is given back after a refusal
        with pytest.raises(UserError, match=message):
            other.finished
        with pytest.raises(UserError, match=message):
            with other:
                pass
    assert before == {name: run.path(name).read_bytes() for name in names(run.folder)}


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"{}", b'{"settings": 1, "parents": 2}', b"\xff"])
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged: restore it, or delete"):
        Run(tmp_path, SETTINGS, PARENTS).finished


@pytest.mark.parametrize("name", ["model.pt", "resume.pt", "metrics.jsonl"])
def test_a_folder_of_unknown_origin_is_not_touched(tmp_path, name):
    (tmp_path / name).write_bytes(b"somebody's")
    with pytest.raises(UserError, match=f"holds {name} but no config.json"):
        with Run(tmp_path, SETTINGS, PARENTS):
            pass
    assert (tmp_path / name).read_bytes() == b"somebody's"


def test_a_reader_sees_a_finished_run():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to other users
        os.chmod(folder, 0o755)
        with Run(f"{folder}/run", SETTINGS, PARENTS) as run:
            run.finish({})
        run.folder.chmod(0o555)
        root = os.geteuid() == 0  # whom permissions do not bind
        try:
            if root:
                os.seteuid(65534)
            assert run.finished, "read permission must be enough to see that a run is finished"
            with pytest.raises(UserError, match="cannot write .*Permission denied"):
                write_whole(run.path("a"), lambda file: file.write(b"x"))
        finally:
            if root:
                os.seteuid(0)
            run.folder.chmod(0o755)


# ------------------------------------------------------------------------------ lock

def test_the_second_process_refuses_until_the_first_is_dead(tmp_path):
    run, (read, write) = Run(tmp_path / "run", SETTINGS, PARENTS), os.pipe()

    def hold():
        with run:
            os.write(write, b"locked")
            time.sleep(60)

    pid = fork(hold)
    try:
        assert os.read(read, 6) == b"locked"
        with pytest.raises(UserError, match="run is in use by another process: wait for it to end"):
            with run:
                pass
        assert not run.finished, "looking needs no lock"
    finally:
        kill(pid)
    with run:  # at once: the kernel gave the lock back
        assert run.resume() is None


# ------------------------------------------------------------------------------ resume

def test_resume_cuts_metrics_back_to_the_checkpoint(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        for step in range(3):
            run.log({"step": step, "loss": 1 / (step + 1)})
        run.checkpoint({"step": 3, "w": torch.ones(2)})
        for step in 3, 4:
            run.log({"step": step})
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "lo')
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4], "a torn row is no row"
    with run:
        state = run.resume()
        assert state["step"] == 3 and state["w"].tolist() == [1, 1]
        run.log({"step": 3})
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3]
    assert run.metrics()[1] == {"step": 1, "loss": 0.5}, "the rows kept are the rows logged"


def test_without_a_checkpoint_the_run_starts_again(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.log({"step": 0})
    with run:
        assert run.resume() is None
        assert run.metrics() == [], "step 0 would be there twice"


def test_damaged_resume(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.checkpoint({"step": 1, "w": torch.ones(100)})
    path = run.path("resume.pt")
    path.write_bytes(path.read_bytes()[:-50])
    with run, pytest.raises(UserError, match=r"resume\.pt is truncated .* delete it and run the"):
        run.resume()
    save_tensors(path, [1, 2])
    with run, pytest.raises(UserError, match=r"resume\.pt is no checkpoint of a run: restore it"):
        run.resume()
    path.unlink()  # as the message says
    with run:
        assert run.resume() is None


def test_a_full_disk_during_log(tmp_path, file_limit):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.log({"step": 0})
        run.checkpoint({"step": 1})
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large"):
            run.log({"step": 1, "text": "x" * 200_000})
    with run:
        assert run.resume()["step"] == 1 and run.metrics() == [{"step": 0}]


def test_rows_are_on_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(runs, "sync", lambda path: calls.append(path.name))
    with Run(tmp_path / "run", SETTINGS, PARENTS) as run:
        run.log({"step": 0})
        calls.clear()
        run.checkpoint({"step": 1})
    assert calls == ["metrics.jsonl", "run"], "a power cut could lose rows that resume() relies on"


def test_writing_outside_with_is_a_bug(tmp_path):
    run = Run(tmp_path, SETTINGS, PARENTS)
    for write in (run.resume, lambda: run.log({"step": 0}), lambda: run.checkpoint({"step": 0}),
                  lambda: run.finish({})):
        with pytest.raises(AssertionError, match="with run:"):
            write()
    assert names(tmp_path) == []


def compute(folder, pause):
    """Forty steps of a chaotic map, each logged, a checkpoint after every third."""
    run = Run(folder, SETTINGS, PARENTS)
    with run:
        state = run.resume() or {"step": 0, "x": torch.tensor(0.3)}
        for step in range(state["step"], 40):
            state = {"step": step + 1, "x": 3.9 * state["x"] * (1 - state["x"])}
            run.log({"step": step, "x": state["x"].item()})
            time.sleep(pause)
            if step % 3 == 2:
                run.checkpoint(state)
        run.finish(state)


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path):
    straight, killed, rng, kills = tmp_path / "straight", tmp_path / "killed", random.Random(1), 0
    compute(straight, 0)
    while not Run(killed, SETTINGS, PARENTS).finished and kills < 20:
        pid = fork(lambda: compute(killed, 0.002))
        time.sleep(rng.uniform(0.01, 0.06))
        kills += kill(pid) == -signal.SIGKILL
    if not Run(killed, SETTINGS, PARENTS).finished:
        compute(killed, 0)
    assert kills > 1, "nothing was killed: the test shows nothing"
    for name in "model.pt", "metrics.jsonl", "config.json":
        assert file_hash(straight / name) == file_hash(killed / name), f"{name} differs by kills"
    assert not list(killed.glob(".*.tmp")) and not (killed / "resume.pt").exists()


# ------------------------------------------------------------------------------ main

def test_main_exit(capsys):
    def refuse():
        raise UserError("no such stage 'x': use one of sft, dpo")

    assert runs.main_exit(lambda: None) == 0 and runs.main_exit(lambda: 3) == 3
    assert runs.main_exit(refuse) == 2
    assert capsys.readouterr().err == "error: no such stage 'x': use one of sft, dpo\n"
    with pytest.raises(ZeroDivisionError):
        runs.main_exit(lambda: 1 / 0)


def test_importing_runs_does_not_import_torch():
    code = "import sys, support.runs; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0, "plot_frontier.py must run where torch is not installed"
