"""What the checks share: who is examined, comparisons with a message, a count of lines run.

It knows nothing of any exercise. `__tracebackhide__` leaves these functions out of what pytest
shows of a failed check, so that the message comes first.
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
    from mutants import MUTANTS  # here, because they import some exercises: an error in one
    from solutions import SOLUTIONS  # student's file must not stop the checks of the others

    names, wrong = dict(SOLUTIONS[number]), MUTANTS.get(who.removeprefix("mutant:"))
    if who != "solution" and not (wrong and who.startswith("mutant:")):
        raise pytest.UsageError(f"--impl is student, solution or mutant:NAME, got {who!r}; the "
                                f"names: {', '.join(MUTANTS)}")
    if wrong and wrong.exercise == number:
        names[wrong.hole] = wrong.value
    return SimpleNamespace(**names)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def slope(loss: Tensor, x: Tensor) -> Tensor:
    """The gradient of the sum of the losses."""
    return torch.autograd.grad(loss.sum(), x)[0]


def near(got: Tensor | float, wanted: Tensor | float, message: str, tolerance=1e-9) -> None:
    __tracebackhide__ = True
    got, wanted = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (got, wanted))
    same_shape(got, wanted.shape or got.shape, message)
    worst = float((got - wanted).abs().max())
    assert worst <= tolerance, f"{message} (off by {worst:.3g})"


def same_shape(got: Tensor, shape, message: str) -> None:
    __tracebackhide__ = True
    kind = tuple(got.shape) if torch.is_tensor(got) else type(got).__name__
    assert kind == tuple(shape), f"{message} (wanted shape {tuple(shape)}, got {kind})"


def losses_and_rewards(results, N: int, B: int) -> tuple[Tensor, Tensor]:
    """The two results of a loss on N pairs of B completions, if their shapes are right."""
    __tracebackhide__ = True
    got = len(results) if isinstance(results, (tuple, list)) else f"one {type(results).__name__}"
    assert got == 2, f"return two results, losses (N,) and rewards r̂ (B,): got {got}"
    same_shape(results[0], (N,), "return one loss per pair, not their mean: the training loop "
               "divides by the number of pairs")
    same_shape(results[1], (B,), "return one reward per completion, not one per pair")
    return results


def committed(impl, name: str, number: str, what: str):
    """A prediction or an explanation, which must be there before anything is measured."""
    __tracebackhide__ = True
    value = getattr(impl, name)
    assert value is not None, f"exercise {number}: {name} is None: {what}"
    return value


def two_sentences(impl, number: str, question: str) -> None:
    __tracebackhide__ = True
    text = committed(impl, "EXPLANATION", number, f"write two sentences: {question}")
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if len(s.split()) >= 5]
    assert len(sentences) >= 2, "EXPLANATION must have two sentences of five words or more, got " \
                                f"{len(sentences)}: {question}"


def predicted_order(impl, number: str, names) -> list:
    """PREDICTION: all of `names`, by KL, from the least to the most."""
    __tracebackhide__ = True
    said = committed(impl, "PREDICTION", number, "before you train, commit the order of "
                     f"{list(names)} by KL, from the least to the most")
    assert sorted(said) == sorted(names), f"PREDICTION is {said}: give each of {list(names)} " \
        "once, from the least KL to the most"
    return said


def in_order(said: list, points: dict, what: str, why: str) -> None:
    """Along the predicted order the measured KL rises, or stays within twice its errors.

    what: how a name of `said` is printed, as "β {:g}". why: a sentence for a wrong order.
    """
    __tracebackhide__ = True
    table = ", ".join(f"{what.format(name)}: {points[name]['kl']:.2f} ± {points[name]['kl_se']:.2f}"
                      for name in sorted(points, key=lambda name: points[name]["kl"]))
    for less, more in zip(said, said[1:]):
        noise = 2 * (points[less]["kl_se"] + points[more]["kl_se"])
        assert points[less]["kl"] <= points[more]["kl"] + noise, \
            f"you predicted less KL for {what.format(less)} than for {what.format(more)}. " \
            f"Measured KL in nats: {table}. {why}. Leave the prediction as it is, and say in " \
            "EXPLANATION what you had not thought of"


def lines_run(function, *args) -> int:
    """Lines of Python that a call runs: a loop over the batch runs more of them for a larger
    batch."""
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
