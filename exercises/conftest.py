"""Who is examined, with which inputs, on which runs: --impl, --seed, --runs."""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]


def pytest_addoption(parser):
    parser.addoption("--impl", default="student", help="student, solution or mutant:NAME")
    parser.addoption("--seed", type=int, default=0, help="student number: draws every input")
    parser.addoption("--runs", default=str(HERE.parent / "out" / "toy"), help="folder of the runs")


@pytest.fixture
def impl(request):
    from grading import implementation
    return implementation(request.path.stem[-2:], request.config.getoption("impl"))


@pytest.fixture
def rng(request):
    return torch.Generator().manual_seed(request.config.getoption("seed"))


@pytest.fixture
def runs(request):
    return Path(request.config.getoption("runs"))
