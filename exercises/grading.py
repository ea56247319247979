"""What the checks share: who is examined, comparisons that speak, a count of lines run.

Knows nothing of any exercise.
"""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent


def implementation(number: str, who: str):
    """What exercise `number` asks for, as attributes, from the one who is examined.

    who: student (the ex*.py files), solution, or mutant:NAME (a wrong answer in its own exercise,
    the solution elsewhere). pytest.UsageError for anyone else.
    """
    if who == "student":
        file, = HERE.glob(f"ex{number}_*.py")
        return importlib.import_module(file.stem)
    from mutants import MUTANTS  # here, for they import some exercises: a slip in one student's
    from solutions import SOLUTIONS  # file then leaves the checks of the others running

    names, wrong = dict(SOLUTIONS[number]), MUTANTS.get(who.removeprefix("mutant:"))
    if who != "solution" and not (wrong and who.startswith("mutant:")):
        raise pytest.UsageError(f"--impl is student, solution or mutant:NAME, got {who!r}; the "
                                f"names: {', '.join(MUTANTS)}")
    if wrong and wrong.exercise == number:
        names[wrong.hole] = wrong.value
    return SimpleNamespace(**names)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def near(got: Tensor | float, wanted: Tensor | float, message: str, tolerance=1e-9) -> None:
    got, wanted = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, wanted))
    same_shape(got, wanted.shape or got.shape, message)
    worst = float((got - wanted).abs().max())
    assert worst <= tolerance, f"{message} (off by {worst:.3g})"


def same_shape(got: Tensor, shape, message: str) -> None:
    kind = tuple(got.shape) if torch.is_tensor(got) else type(got).__name__
    assert kind == tuple(shape), f"{message} (wanted shape {tuple(shape)}, got {kind})"


def committed(impl, name: str, number: str, what: str):
    """A prediction or an explanation, insisted on before anything is measured."""
    value = getattr(impl, name)
    assert value is not None, f"exercise {number}: {name} is None: {what}"
    return value


def two_sentences(impl, number: str, question: str) -> None:
    text = committed(impl, "EXPLANATION", number, f"write two sentences: {question}")
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if len(s.split()) >= 5]
    assert len(sentences) >= 2, f"EXPLANATION wants two whole sentences, got {len(sentences)}: " \
                                f"{question}"


def lines_run(function, *args) -> int:
    """Lines of Python that a call runs: a loop over the batch runs more of them on a larger one."""
    function(*args)  # what only a first call does
    n, before = 0, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal n
        n += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return n
