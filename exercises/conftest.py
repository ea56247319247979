"""Who is examined, with which inputs, on which runs (--impl, --seed, --runs), and the marks."""

import re
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
MEASUREMENT = "test_the_measurement_agrees"  # with a prediction, which may be wrong


def pytest_addoption(parser):
    parser.addoption("--impl", default="student", help="student, solution or mutant:NAME")
    parser.addoption("--seed", type=int, default=0, help="student number: every input is drawn "
                     "from it")
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


def pytest_collection_finish(session):
    session.config.checks = [item.nodeid for item in session.items]


def pytest_terminal_summary(terminalreporter, config):
    """The marks: a line per exercise, green checks of all that count."""
    green = {report.nodeid for report in terminalreporter.stats.get("passed", [])}
    marks, notes = {}, {}
    for check in config.checks:
        if found := re.search(r"test_ex(\d\d)\.py::(\w+)", check):
            number, name = found.groups()
            if name == MEASUREMENT:
                notes[number] = "" if check in green else \
                    "; the prediction was not measured or not confirmed: no mark is lost"
            else:
                marks.setdefault(number, []).append(check in green)
    terminalreporter.section("marks: green checks of all")
    for number, greens in marks.items():
        terminalreporter.line(f"exercise {number}: {sum(greens)} of {len(greens)}"
                              + notes.get(number, ""))
    for report in terminalreporter.stats.get("error", []):
        if found := re.search(r"test_ex(\d\d)\.py$", report.nodeid):
            terminalreporter.line(f"exercise {found[1]}: 0, its file cannot be imported")
    terminalreporter.line(f"all: {sum(map(sum, marks.values()))}")
