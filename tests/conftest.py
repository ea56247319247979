"""Shared by several test files: the command line in this process, runs that are stopped, and the
smallest chain of stages."""

import contextlib
import gc
import io
import itertools
import json
import os
import shutil
import signal
import traceback
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import pytest
import torch
import torch._dynamo  # else the first use of an optimizer imports it: 2 s in each forked child
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import experiments.__main__  # noqa: F401  adds the other stages
import gpt
import plot_frontier
import train
from job import Job
from support.runs import Run, main_exit, read_json, read_rows
from support.settings import parse

gc.freeze()  # else each collection visits the objects of these imports: 10 % of the time
torch.set_num_threads(1)  # for equal bits, and because a forked child has no copy of the threads

# a chain of stages in a second: 0.02M parameters, and dropout, so that resuming is tested with it
TINY = ("--preset toy --device cpu --threads 1 --reviews 300 --vocab 900 --n-layer 1 --n-head 2 "
        "--n-embd 16 --n-ctx 48 --sft-steps 8 --sft-batch 16 --sft-lr 0.006 --dropout 0.1 "
        "--prompts 40 --num-completions 4 --eval-prompts 8 --valid-prompts 8 --optimum-samples 4 "
        "--max-new-tokens 24 --beta 0.5 --dpo-steps 6 --dpo-batch 5 --dpo-lr 0.0002 "
        "--rm-batch 12 --ppo-steps 4 --ppo-rollouts 8").split()


def train_py(argv, figures=False) -> int:
    """Does what python train.py does, in this process. Figures, which take a second, are faked."""
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(plot_frontier.Figure, "savefig", lambda self, file, **_: file.write(b"-"))
        return main_exit(lambda: train.main(list(map(str, argv))))


def command(*argv, figures=False) -> SimpleNamespace:
    """train.py's exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train_py(argv, figures)
        except SystemExit as e:  # raised by argparse
            code = e.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refused(result, *words) -> str:
    """A user's mistake must give one line on stderr and exit code 2. Returns the line."""
    assert result.code == 2, f"exit code {result.code}: {result.err or result.out}"
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), f"not one sentence: {result.err}"
    for word in words:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"
    return lines[0]


def in_child(work) -> tuple[int, str]:
    """The exit code (or minus the signal) and the output of work() in a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            os.dup2(write, 1), os.dup2(write, 2)
            signal.alarm(60)  # a child that hangs must not outlive the suite
            with open(1, "w", closefd=False) as out, contextlib.redirect_stdout(out), \
                    contextlib.redirect_stderr(out):
                try:
                    code = work()
                except BaseException:
                    traceback.print_exc()
                    code = 70
            os._exit(code)
        finally:
            os._exit(71)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        text = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


# ------------------------------------------------------------------------------ a GPU's waits

class Functions(TorchFunctionMode):
    """Records calls of tolist and cpu. On a CPU the dispatch mode below does not see them."""

    def __init__(self, found: list):
        super().__init__()
        self.found = found

    def __torch_function__(self, f, types, args=(), kwargs=None):
        name = getattr(f, "__name__", "")
        self.found += [name] * (name in ("tolist", "cpu"))
        return f(*args, **kwargs or {})


class Waits(TorchDispatchMode):
    """`with Waits() as found:` lists the operations at which the CPU would wait for a GPU: those
    that read a number or an array, and those whose result has a shape that depends on data."""

    NAMES = {"_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward",
             "_unique2"}

    def __enter__(self) -> list:
        super().__enter__()
        self.found = []
        self.functions = Functions(self.found)
        self.functions.__enter__()
        return self.found

    def __exit__(self, *error):
        self.functions.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        name = f._schema.name.removeprefix("aten::")
        by_mask = name.removeprefix("_").startswith("index") and "select" not in name and \
            isinstance(args[1], (list, tuple)) and \
            any(i is not None and i.dtype == torch.bool for i in args[1])
        self.found += [name] * (name in self.NAMES or by_mask)
        return f(*args, **kwargs or {})


# ------------------------------------------------------------------------------ stopped runs


KILL, CTRL_C = signal.SIGKILL, signal.SIGINT
SENTENCE = "stopped: run the same command again to go on"
CLOCK = ("seconds", "tokens_per_s", "targets_per_s", "pairs_per_s", "groups_per_s", "mfu")


def die(by, kind, name="", n=1) -> None:
    """Makes this child process send itself the signal `by`. `kind` is "log": halfway through the
    n-th line that it logs; "sample": at the n-th token; "torn": halfway through the n-th write of
    the file `name`; or "after": after that write."""
    calls = itertools.count(1)

    def due(now, path=""):
        return now == kind and Path(path).name == name and next(calls) == n

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    log, draw, rename = Run.log, gpt.sample_inverse_cdf, os.replace

    def dying_log(run, row):
        if due("log"):
            with open(run.path("metrics.jsonl"), "a") as file:
                file.write(json.dumps(row)[:40])
            os.kill(os.getpid(), by)
        log(run, row)

    def dying_draw(*args):
        if due("sample"):
            os.kill(os.getpid(), by)
        return draw(*args)

    def dying_rename(source, path):
        if due("torn", path):
            os.truncate(source, os.path.getsize(source) // 2)
            os.kill(os.getpid(), by)
        rename(source, path)
        if due("after", path):
            os.kill(os.getpid(), by)

    Run.log, gpt.sample_inverse_cdf, os.replace = dying_log, dying_draw, dying_rename


def stopped(argv, by, kind, name="", n=1) -> str:
    """What train.py prints in a child that sends itself this signal; see `die`."""
    code, text = in_child(lambda: (die(by, kind, name, n), train_py(argv))[1])
    assert code == (-KILL if by == KILL else 130), f"{kind} {name} {n} ended with {code}: {text}"
    return text


def stopped_and_finished(argv, *stops):
    """Runs a command, stops it in each of these ways, and then lets it finish."""
    for stop in stops:
        text = stopped([*argv, "--save-secs", 0], *stop)
        if stop[0] == CTRL_C:
            assert text.count(SENTENCE) == 1 and "Traceback" not in text, text
    result = command(*argv)
    assert result.code == 0, result.err
    return result


def without_clock(obj):
    if isinstance(obj, list):
        return list(map(without_clock, obj))
    return {k: without_clock(v) for k, v in obj.items() if k not in CLOCK} \
        if isinstance(obj, dict) else obj


def contents(run: Path) -> dict:
    """Everything that a run has made, without the times that it took."""
    read = {".json": lambda path: without_clock(read_json(path)), ".png": lambda path: "a picture",
            ".jsonl": lambda path: without_clock(read_rows(path))}
    made = {path.name: read.get(path.suffix, Path.read_bytes)(path) for path in run.iterdir()
            if path.name not in (".lock", "config.json")}
    return {"metrics.jsonl": []} | made


def same(run: Path, other: Path) -> None:
    a, b = contents(run), contents(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == b[name], f"{name} of {run.name} differs from that of the other run"


# ------------------------------------------------------------------------------ the smallest chain


def folder(out: Path, stage: str) -> Path:
    """The only folder of a stage under --out, with any suffix and preset."""
    found = [f for f in out.glob(f"*/{stage}*") if f.name == stage or f.name[len(stage)] == "-"
             and not f.name.startswith("ppo-gt" if stage == "ppo" else " ")]
    assert len(found) == 1, f"{stage} under {out}: {found}"
    return found[0]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def chain(tmp_path_factory, data) -> SimpleNamespace:
    """sft, groups and dpo at TINY, without stops: .out, .data, and .text, which was printed."""
    out = tmp_path_factory.mktemp("chain")
    result = command(*TINY, "--out", out, "--data", data, figures=True)
    assert result.code == 0, result.err
    return SimpleNamespace(out=out, data=data, text=result.out)


@pytest.fixture
def copied(chain, tmp_path):
    """copied("sft", ...) -> a new --out with copies of these stages of the chain."""
    def copy(*stages):
        out = tmp_path / "out"
        for stage in stages:
            shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
        return out

    return copy


@pytest.fixture
def job(chain) -> Job:
    argv = [*TINY, "--out", str(chain.out), "--data", str(chain.data)]
    _, preset, _, cfg = parse(argv, False)
    return Job(preset, cfg, argv)
