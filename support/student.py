"""A student's own code: a weight for --weight, and functions that replace the core's.

The core's module and its table of weights are arguments. Whatever a student's code raises becomes a
CodeError with file and line, before any training where that is possible.
"""

import functools
import importlib.util
import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from support.runs import UserError, first_line, out_of_memory


class CodeError(UserError):
    """A mistake in a student's code."""

    def __init__(self, message: str):
        super().__init__(f"{message}; correct it, and run the same command again")


@contextmanager
def blame(path: str) -> Iterator[None]:
    """What a student's code raises in the block, sys.exit() included, becomes a CodeError. It names
    the line in the student's file, or the line of ours that a wrong result made fail."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        frames = [(x.filename, x.lineno) for x in traceback.extract_tb(error.__traceback__)]
        frames.append((getattr(error, "filename", None), getattr(error, "lineno", None)))  # syntax
        mine = [line for name, line in frames if name == os.path.abspath(path)]
        where = f"{path}:{mine[-1]}" if mine else \
            "with the code of {}, {}:{}".format(path, *frames[-2])
        raise CodeError(f"{where} raised {type(error).__name__}: {first_line(error)}") from error


def import_file(path: str) -> ModuleType:
    """The module in a student's file. UserError if there is no file, or its code fails."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not spec or not Path(path).is_file():
        raise UserError(f"cannot import {path}: there is no such Python file")
    with blame(path):
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def load_weight(spec: str, weights: Mapping[str, Callable]) -> Callable[[Tensor, float], Tensor]:
    """The weight (margin (N,), beta) -> (N,) of this name in `weights`, or of path.py:function.

    UserError for an unknown name, a missing file or function, or a wrong signature. A student's
    function is called once here, and checked at each call: CodeError for what it raises, for a
    wrong shape, and for a value that is not finite.
    """
    if spec in weights:
        return weights[spec]
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py"):
        raise UserError(f"unknown weight {spec!r}: give one of {', '.join(weights)}, or "
                        "path/to/file.py:function")
    function = getattr(import_file(path), name, None)
    if not inspect.isfunction(function):
        raise UserError(f"weight {spec!r}: {path} defines no function {name!r}")
    where = f"{path}:{function.__code__.co_firstlineno} ({name})"
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise UserError(f"{where} must take (margin, beta): {error}") from error

    def weight(margin: Tensor, beta: float) -> Tensor:
        with blame(path):
            w = function(margin, beta)
        got = tuple(w.shape) if torch.is_tensor(w) else type(w).__name__
        if got != tuple(margin.shape):
            raise CodeError(f"{where} must return a tensor of the margin's shape "
                            f"{tuple(margin.shape)}, got {got}")
        wrong = ~w.isfinite()
        if wrong.any():
            raise CodeError(f"{where} must return finite weights, got {w[wrong][0]:g} at margin "
                            f"{margin[wrong][0]:g}")
        return w.to(margin)

    weight(torch.tensor([-1.0, 0.0, 1.0]), 1.0)
    return weight


def own_functions(module: ModuleType, path: str) -> dict[str, Callable]:
    """A student's functions, by name, that share a name with one of `module`, `main` apart.

    UserError if nothing is shared, or if the parameters of a shared function differ.
    """
    student, core = import_file(path), vars(module)
    shared = {name: f for name, f in vars(student).items()
              if inspect.isfunction(f) and f.__globals__ is vars(student)  # not imported there
              and inspect.isfunction(core.get(name)) and name != "main"}
    if not shared:
        raise UserError(f"{path} defines no function of {module.__name__}.py: give yours the name "
                        "and the parameters that it has there")
    for name, function in shared.items():
        want, got = (list(inspect.signature(f).parameters) for f in (core[name], function))
        if want != got:
            raise UserError(f"{path}:{function.__code__.co_firstlineno}: {name} must take "
                            f"({', '.join(want)}), it takes ({', '.join(got)})")
    return shared


def blamed(function: Callable, path: str) -> Callable:
    """The function. If there is a path, what the function raises is blamed on the student's file of
    that path. It is for the student's functions, and for ours that receive what these return."""
    @functools.wraps(function)
    def call(*args, **kwargs):
        with blame(path):
            return function(*args, **kwargs)

    return call if path else function


@contextmanager
def own_code(module: ModuleType, path: str) -> Iterator[None]:
    """In the block, functions of the student's file, if there is a path, replace the module's."""
    ours = dict(vars(module))
    if path:
        vars(module).update((name, blamed(function, path))
                            for name, function in own_functions(module, path).items())
    try:
        yield
    finally:
        vars(module).update(ours)
