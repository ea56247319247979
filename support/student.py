"""A student's own code: a weight for --weight, and functions that replace the core's.

The core's module and its table of weights are arguments. Bad code is a UserError, raised before
any training where that is possible.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from support.runs import UserError


def import_file(path: str) -> ModuleType:
    """The module in a user's file. UserError when there is no file, or its code fails."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # no such file, or anything that its code raises
        raise UserError(f"cannot import {path}: {error!r}") from error
    return module


def load_weight(spec: str, weights: Mapping[str, Callable]) -> Callable[[Tensor, float], Tensor]:
    """The weight (margin (N,), beta) -> (N,) of this name in `weights`, or of path.py:function.

    UserError for an unknown name, a missing file or function, or a wrong signature. A user's
    function is also checked at each call: UserError for a wrong shape or a value not finite.
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
        w = function(margin, beta)
        got = tuple(w.shape) if torch.is_tensor(w) else type(w).__name__
        if got != tuple(margin.shape):
            raise UserError(f"{where} must return a tensor of the margin's shape "
                            f"{tuple(margin.shape)}, got {got}")
        wrong = ~w.isfinite()
        if wrong.any():
            raise UserError(f"{where} must return finite weights, got {w[wrong][0]:g} at margin "
                            f"{margin[wrong][0]:g}")
        return w.to(margin)

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


def use_module(module: ModuleType, path: str) -> list[str]:
    """Puts the functions of a student's file in place of the module's; returns their names."""
    functions = own_functions(module, path)
    vars(module).update(functions)
    return list(functions)
