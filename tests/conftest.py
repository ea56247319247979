"""What several test files share: the command line in process, and the smallest chain of stages."""

import contextlib
import io
import os
import shutil
import signal
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import experiments.__main__  # noqa: F401  adds the other stages
import plot_frontier
import train
from support.runs import main_exit

torch.set_num_threads(1)  # bit-for-bit, and a forked child must not miss its threads

# a chain of stages in a second: 0.02M parameters, with dropout so that resuming is put to the test
TINY = ("--preset toy --device cpu --threads 1 --reviews 300 --vocab 900 --n-layer 1 --n-head 2 "
        "--n-embd 16 --n-ctx 48 --sft-steps 8 --sft-batch 16 --sft-lr 0.006 --dropout 0.1 "
        "--prompts 40 --num-completions 4 --eval-prompts 8 --valid-prompts 8 --optimum-samples 4 "
        "--max-new-tokens 24 --beta 0.5 --dpo-steps 6 --dpo-batch 5 --dpo-lr 0.0002 "
        "--rm-batch 12 --ppo-steps 4 --ppo-rollouts 8").split()


def train_py(argv, figures=False) -> int:
    """What python train.py does, in this process, but for the second that a figure takes."""
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
        except SystemExit as e:  # argparse's
            code = e.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def refused(result, *words) -> str:
    """A user's mistake is one sentence on stderr and exit code 2: no traceback, no second line."""
    assert result.code == 2, f"exit code {result.code}: {result.err or result.out}"
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), f"not one sentence: {result.err}"
    for word in words:
        assert str(word) in lines[0], f"{word!r} is not in: {lines[0]}"
    return lines[0]


def in_child(work) -> tuple[int, str]:
    """The exit code (minus the signal) and the output of work() in a forked process of its own."""
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


def folder(out: Path, stage: str) -> Path:
    """The only folder of a stage under --out, whatever its suffix and preset."""
    found = [f for f in out.glob(f"*/{stage}*") if f.name == stage or f.name[len(stage)] == "-"
             and not f.name.startswith("ppo-gt" if stage == "ppo" else " ")]
    assert len(found) == 1, f"{stage} under {out}: {found}"
    return found[0]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def chain(tmp_path_factory, data) -> SimpleNamespace:
    """sft, groups and dpo at TINY, never stopped: .out, and what the command printed."""
    out = tmp_path_factory.mktemp("chain")
    result = command(*TINY, "--out", out, "--data", data, figures=True)
    assert result.code == 0, result.err
    return SimpleNamespace(out=out, data=data, text=result.out)


@pytest.fixture
def copied(chain, tmp_path):
    """copied("sft", ...) -> an --out of one's own, holding copies of the chain's stages."""
    def copy(*stages):
        out = tmp_path / "out"
        for stage in stages:
            shutil.copytree(folder(chain.out, stage), out / "toy" / folder(chain.out, stage).name)
        return out

    return copy
