"""Laws of support/runs.py: a kill loses nothing, a folder keeps one identity, and one process at a
time works in it. The sentences that users read are rows of test_mistakes.py."""

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support import runs
from support.runs import (Run, UserError, file_hash, json_hash, load_tensors, read_json, read_rows,
                          save_json, save_tensors, write_whole)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
SETTINGS, PARENTS = {"beta": 0.1, "layers": (2, 3)}, {"sft": "aaaa"}
ROOT = Path(runs.__file__).parents[1]


def fork(work):
    """The process id of a child that only does work(started). It is returned when the child has
    called started()."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work(lambda: os.write(write, b"."))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return pid


def kill(pid):
    """kill -9. Returns minus the signal, or the child's exit code if it had ended before."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------ whole files

def test_a_file_is_replaced_whole_and_readable_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        for content in b"old", b"new":
            write_whole(tmp_path / "a", lambda file: file.write(content))
    finally:
        os.umask(before)
    assert contents(tmp_path) == {"a": b"new"}, "a temporary file was left"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_failed_write_keeps_the_old_file_and_no_half_of_the_new(tmp_path):
    def full_disk(file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "a", lambda file: file.write(b"old"))
    with pytest.raises(UserError, match=r"cannot write .*/a: No space left on device; free some"):
        write_whole(tmp_path / "a", full_disk)
    with pytest.raises(ZeroDivisionError):  # a bug in the writer stays a bug
        write_whole(tmp_path / "a", lambda file: 1 / 0)
    assert contents(tmp_path) == {"a": b"old"}


def test_bytes_are_on_disk_before_their_name_is(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def record_fsync(fd):
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    write_whole(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["fsync file", "rename", "fsync folder"], "a power cut could empty it"


def test_kill_9_during_a_write_leaves_old_or_new(tmp_path):
    """Each write repeats one byte value a million times. Two values in a file show a torn write."""
    path, seen, rng = tmp_path / "a", set(), random.Random(0)

    def write_forever(started):
        for i in range(10**9):
            value = bytes([i % 256])
            write_whole(path, lambda file: [file.write(value * 1000) for _ in range(1000)])
            started()

    for _ in range(15):
        pid = fork(write_forever)
        time.sleep(rng.uniform(0, 0.02))
        assert kill(pid) == -signal.SIGKILL, "the writer ended by itself"
        content = path.read_bytes()
        assert len(content) == 1_000_000 and len(set(content)) == 1, "a kill left a torn file"
        seen.add(content[0])
    assert len(seen) > 1, "every kill came at the same write: the test shows nothing"
    for name in "other", ".notes.tmp", f".{'0' * 32}":
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / ".pipe.tmp")
    with Run(tmp_path, SETTINGS, PARENTS):
        assert not list(tmp_path.glob(".a.*.tmp")), "the next run removes these files"
        assert {"a", "other", ".notes.tmp", ".pipe.tmp", f".{'0' * 32}"} <= set(names(tmp_path))


# ------------------------------------------------------------------------------ what files hold

def test_equal_states_give_equal_bytes(tmp_path):
    for name, first in ("a.pt", 0.0), ("b.pt", 0.0), ("c.pt", 1.0):
        save_tensors(tmp_path / name, {"w": torch.arange(9.0) + first, "betas": (0.9, 0.95)})
    a, b, c = (file_hash(tmp_path / name) for name in ("a.pt", "b.pt", "c.pt"))
    assert a == b != c, "a hash must identify a state"


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    save_tensors(path, {"w": torch.arange(1000.0)})
    whole = path.read_bytes()
    torch.save(SystemExit("not tensors"), path)  # unpickled, it could run any code
    foreign = path.read_bytes(), b"<html>not found</html>", b"PK\3\4 not a zip"
    for content in *(whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)), *foreign:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pt.*; check the path, or restore the file"):
            load_tensors(path)


def test_json_and_rows_are_read_as_written_without_a_torn_last_row(tmp_path):
    save_json(tmp_path / "a.json", {"beta": [0.1, None]})
    assert read_json(tmp_path / "a.json") == {"beta": [0.1, None]}
    for torn in b'{"ste', b'{"ste\n', b"5\n", b"null\n", b'{"loss": 1}\n', b"[" * 10**6 + b"\n":
        (tmp_path / "rows.jsonl").write_bytes(b'{"step": 0}\n{"step": 1}\n' + torn)
        assert read_rows(tmp_path / "rows.jsonl") == [{"step": 0}, {"step": 1}]
    for damage in b"{", b"\xff", b"[" * 10**6:
        (tmp_path / "a.json").write_bytes(damage)
        with pytest.raises(UserError, match=r"a\.json is damaged .*delete that stage's folder"):
            read_json(tmp_path / "a.json")
    for read in read_json, read_rows:
        with pytest.raises(UserError, match="cannot read .*gone: No such file.*check the path"):
            read(tmp_path / "gone")


def test_json_hash_is_of_the_value():
    assert json_hash({"a": 1, "b": [2, 3]}) == json_hash({"b": (2, 3), "a": 1})
    assert json_hash({"a": 1}) != json_hash({"a": "1"})
    assert len(json_hash({})) == 16 and int(json_hash({}), 16) >= 0


# ------------------------------------------------------------------------------ identity

def test_a_run_from_start_to_finish(tmp_path):
    run = Run(tmp_path / "out/run", SETTINGS, PARENTS, about={"torch": "2"})
    assert not run.finished and not run.folder.exists(), "`finished` must not make the folder"
    with run:
        assert read_json(run.path("config.json")) == {
            "settings": {"beta": 0.1, "layers": [2, 3]}, "parents": PARENTS,
            "about": {"torch": "2"}, "identity": run.identity, "files": {}}
        assert run.load_checkpoint({}, 1) == 0
        run.log({"step": 0, "loss": 1.5})
        run.checkpoint({"step": 1})
        assert not run.finished
        run.finish({"w": torch.ones(2)})
    assert run.finished and run.metrics() == [{"step": 0, "loss": 1.5}]
    assert names(run.folder) == [".lock", "config.json", "metrics.jsonl", "model.pt"]
    again = Run(run.folder, {"layers": [2, 3], "beta": 0.1}, PARENTS, about={"torch": "3"})
    assert again.finished, "order of settings, list or tuple, and versions are not identity"
    with again, pytest.raises(UserError, match="was finished by another process"):
        again.load_checkpoint({}, 1)
    assert again.metrics(), "entering a finished run must not clear it"


def test_the_last_file_may_be_of_any_format(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS, final="groups.jsonl") as run:
        run.finish(b"{}\n")
    assert run.finished and run.path("groups.jsonl").read_bytes() == b"{}\n"


def test_a_changed_file_of_a_finished_run_is_refused(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.log({"step": 0})
        save_json(run.path("result.json"), {"kl": 1.5})
        run.path("samples.txt").write_text("a film")
        run.finish({"w": torch.ones(2)})
    assert set(run.files) == {"metrics.jsonl", "result.json", "model.pt"}
    again = Run(tmp_path, SETTINGS, PARENTS)
    assert again.finished and again.files == run.files
    for name in run.files:
        whole = run.path(name).read_bytes()
        for content in whole[:-1], whole + b"\n", b"":
            run.path(name).write_bytes(content)
            with pytest.raises(UserError, match=f"{name} has changed since the run was finished"):
                again.finished
        run.path(name).unlink()
        if name != "model.pt":
            with pytest.raises(UserError, match=f"cannot read .*{name}"):
                again.finished
        run.path(name).write_bytes(whole)
    run.path("samples.txt").write_text("no later stage reads this file, so it may change")
    assert Run(tmp_path, SETTINGS, PARENTS).finished


def test_a_folder_without_a_checkpoint_can_be_used_with_other_settings(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.log({"step": 0})  # the run ends before its first checkpoint
    other = Run(tmp_path, {"beta": 0.5}, {"sft": "bbbb"})
    assert not other.finished
    with other:
        assert other.load_checkpoint({}, 1) == 0 and other.metrics() == []
        other.finish({})
    assert other.finished and read_json(tmp_path / "config.json")["settings"] == {"beta": 0.5}


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
    before, other = contents(run.folder), Run(tmp_path / "run", settings, parents)
    for _ in range(2):  # twice, because the first refusal must release the lock
        with pytest.raises(UserError, match=message):
            other.finished
        with pytest.raises(UserError, match=message), other:
            pass
    assert contents(run.folder) == before


@pytest.mark.parametrize("made", ["model.pt", "resume.pt"])
@pytest.mark.parametrize("config", [None, b"", b"{", b"[]", b"{}", b"\xff", b"[" * 10**6,
                                    b'{"settings": 1, "parents": 2}',
                                    b'{"settings": {}, "parents": {}, "files": 3}'])
def test_a_folder_of_unknown_origin_is_not_touched(tmp_path, made, config):
    (tmp_path / made).write_bytes(b"somebody's")
    if config is not None:
        (tmp_path / "config.json").write_bytes(config)
    message = r"config\.json is damaged .*; restore it, or delete" if config is not None else \
        f"holds {made} but no config.json"
    with pytest.raises(UserError, match=message), Run(tmp_path, SETTINGS, PARENTS):
        pass
    assert (tmp_path / made).read_bytes() == b"somebody's"


# ------------------------------------------------------------------------------ lock

def test_the_second_process_refuses_until_the_first_is_dead(tmp_path):
    run = Run(tmp_path / "run", SETTINGS, PARENTS)

    def hold(started):
        with run:
            started()
            time.sleep(60)

    pid = fork(hold)
    try:
        with pytest.raises(UserError, match="run is in use by another process: wait for it"), run:
            pass
        assert not run.finished, "`finished` needs no lock"
    finally:
        kill(pid)
    with run:  # at once, because the kernel has released the lock
        assert run.load_checkpoint({}, 1) == 0


# ------------------------------------------------------------------------------ resume

def test_load_checkpoint_cuts_metrics_back_to_the_checkpoint(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        for step in range(3):
            run.log({"step": step, "loss": 1 / (step + 1)})
        run.checkpoint({"step": 3})
        for step in 3, 4:
            run.log({"step": step})
    with run:
        assert run.load_checkpoint({}, 5) == 3
        run.log({"step": 3})
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3]
    assert run.metrics()[1] == {"step": 1, "loss": 0.5}, "the rows kept are the rows logged"


def test_without_a_checkpoint_the_run_starts_again(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.log({"step": 0})
    with run:
        assert run.load_checkpoint({}, 1) == 0
        assert run.metrics() == [], "step 0 would be there twice"


def test_rows_are_on_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(runs, "sync", lambda path: calls.append(path.name))
    with Run(tmp_path / "run", SETTINGS, PARENTS) as run:
        run.log({"step": 0})
        calls.clear()
        run.checkpoint({"step": 1})
    assert calls == ["metrics.jsonl", "run"], "a power cut could lose rows"


def parts(seed, width=3):
    """What a checkpoint holds: anything with state_dict and load_state_dict."""
    torch.manual_seed(seed)
    return dict(policy=torch.nn.Linear(width, 1), value=torch.nn.Linear(2, 2))


def test_load_checkpoint_puts_every_part_back(tmp_path, capsys):
    saved, loaded = parts(0), parts(1)
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        assert run.load_checkpoint(loaded, 8) == 0, "there is no checkpoint"
        run.checkpoint(dict(step=5) | {name: part.state_dict() for name, part in saved.items()})
        capsys.readouterr()
        assert run.load_checkpoint(loaded, 8) == 5
        assert "going on at step 5 of 8" in capsys.readouterr().out
        for name in saved:
            assert torch.equal(loaded[name].weight, saved[name].weight), name
        assert run.load_checkpoint(loaded, 5) == 5 and not capsys.readouterr().out, "it is done"


def test_load_checkpoint_refuses_what_does_not_fit(tmp_path):
    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.checkpoint(dict(step=5) | {name: p.state_dict() for name, p in parts(0).items()})
        before = run.path("resume.pt").read_bytes()
        for others in parts(0, width=4), parts(0) | dict(scaler=torch.nn.Linear(1, 1)):
            with pytest.raises(UserError, match=r"resume\.pt is damaged or of another") as e:
                run.load_checkpoint(others, 8)
            assert "\n" not in str(e.value)
        assert run.path("resume.pt").read_bytes() == before


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_a_lack_of_memory_is_not_reported_as_a_damaged_file(tmp_path, error):
    class Part:
        def load_state_dict(self, state):
            raise error

    with Run(tmp_path, SETTINGS, PARENTS) as run:
        run.checkpoint(dict(step=5, part=0))
        with pytest.raises(type(error)):
            run.load_checkpoint(dict(part=Part()), 8)


def compute(folder, pause=0.0, started=lambda: None):
    """Forty steps of a chaotic map. Each step is logged, and every third is a checkpoint."""
    chaos = torch.nn.ParameterDict({"x": torch.tensor(0.3)}).requires_grad_(False)
    with Run(folder, SETTINGS, PARENTS) as run:
        begin = run.load_checkpoint({"chaos": chaos}, 40)
        started()
        for step in range(begin, 40):
            chaos["x"].copy_(3.9 * chaos["x"] * (1 - chaos["x"]))
            run.log({"step": step, "x": chaos["x"].item()})
            time.sleep(pause)
            if step % 3 == 2:
                run.checkpoint({"step": step + 1, "chaos": chaos.state_dict()})
        run.finish(chaos.state_dict())


def test_killed_anywhere_it_ends_with_the_same_bytes(tmp_path):
    straight, killed, rng, kills = tmp_path / "straight", tmp_path / "killed", random.Random(1), 0
    compute(straight)
    while not Run(killed, SETTINGS, PARENTS).finished and kills < 20:
        pid = fork(lambda started: compute(killed, 0.002, started))
        time.sleep(rng.uniform(0.005, 0.05))
        kills += kill(pid) == -signal.SIGKILL
    if not Run(killed, SETTINGS, PARENTS).finished:
        compute(killed)
    assert kills > 1, "nothing was killed: the test shows nothing"
    for name in "model.pt", "metrics.jsonl", "config.json":
        assert file_hash(straight / name) == file_hash(killed / name), f"{name} differs after kills"
    assert not list(killed.glob(".*.tmp"))
    # a kill after model.pt may leave resume.pt in the folder, where it is not read
    assert not (straight / "resume.pt").exists()


# ------------------------------------------------------------------------------ main

def test_main_exit(capsys):
    def refuse():
        raise UserError("no such stage 'x': use one of sft, dpo")

    assert runs.main_exit(lambda: None) == 0 and runs.main_exit(lambda: 3) == 3
    assert runs.main_exit(refuse) == 2
    assert capsys.readouterr().err == "error: no such stage 'x': use one of sft, dpo\n"
    with pytest.raises(ZeroDivisionError):
        runs.main_exit(lambda: 1 / 0)


SCRIPT = """
import sys
from support.runs import main_exit

def main():
    for i in range(int(sys.argv[1])):
        print("KL(π ‖ π_ref)", i)
    print("at the end", file=sys.stderr)
    open("done", "w").close()

sys.exit(main_exit(main))
"""


@pytest.mark.parametrize("shell, out, err", [
    ("$PY 2 >&-", "", "at the end\n"),
    ("$PY 2 2>&-", "KL(π ‖ π_ref) 0\nKL(π ‖ π_ref) 1\n", ""),
    ("$PY 2 >&- 2>&-", "", ""),
    ("PYTHONIOENCODING=latin-1 $PY 1", "KL(? ? ?_ref) 0\n", "at the end\n"),
    ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $PY 1", "KL(? ? ?_ref) 0\n", "at the end\n")])
def test_a_program_runs_with_closed_or_ascii_streams(tmp_path, shell, out, err):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(shell.replace("$PY", f"{sys.executable} script.py"), shell=True,
                          cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)),
                          capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    assert (tmp_path / "done").exists()


def test_a_program_whose_output_is_not_read_stops_silently(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(f"{sys.executable} script.py 100000 | head -1; echo ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", cwd=tmp_path, encoding="utf-8",
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True)
    assert (done.stdout, done.stderr) == ("KL(π ‖ π_ref) 0\n1\n", "")
    assert not (tmp_path / "done").exists(), "all output was read: the test shows nothing"


PROGRAMS = {"gpt.py": "torch", "dpo.py": "torch", "train.py": "numpy", "data_imdb.py": "numpy",
            "plot_frontier.py": "numpy", "-m experiments.figures": "numpy",
            "-m experiments.theory": "torch", "-m experiments": "numpy", "script.py": ""}


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_prints_one_sentence_also_during_imports(tmp_path, program):
    """The import of a package is made slow. script.py is stopped in its main()."""
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    (tmp_path / f"{PROGRAMS[program] or 'slow'}.py").write_text(slow)
    (tmp_path / "script.py").write_text("import sys\nfrom support.runs import main_exit\n"
                                        "def main():\n    import slow\nsys.exit(main_exit(main))")
    words = [tmp_path / program] if program == "script.py" else \
        program.split() if " " in program else [ROOT / program]
    child = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True,
                             env=dict(os.environ, PYTHONPATH=f"{tmp_path}:{ROOT}"),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert err == "\nstopped: run the same command again to go on\n"
    late = program == "script.py"
    assert child.returncode == (130 if late else -signal.SIGINT), "a shell shows 130 for both"


def test_importing_runs_does_not_import_torch():
    code = "import sys, support.runs; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT)
    assert done.returncode == 0, "plot_frontier.py must run without torch"
