"""Laws of support/student.py: a student's code is used, and its mistakes are named."""

import pytest
import torch

from support.runs import UserError
from support.student import blamed, import_file, load_weight, own_code, own_functions

WEIGHTS = {"sigmoid": lambda m, beta: torch.sigmoid(-m), "constant": lambda m, beta: 0 * m + 1}
CORE = """
from math import exp

def loss(x, beta):
    return exp(beta * x)

def mean_loss(xs, beta):
    return sum(loss(x, beta) for x in xs) / len(xs)

def main():
    pass
"""


@pytest.fixture
def write(tmp_path):
    """write(code) -> the path of a student's file with that code."""
    def file(code, name="mine.py"):
        (tmp_path / name).write_text(code)
        return str(tmp_path / name)
    return file


@pytest.fixture
def core(write):
    return import_file(write(CORE, "core.py"))


# --- A weight ---

def test_a_weight_is_a_known_one_or_the_function_in_a_file(write):
    assert load_weight("sigmoid", WEIGHTS) is WEIGHTS["sigmoid"]
    path = write("def mine(margin, beta):\n    return beta * margin\n")
    mine = load_weight(f"{path}:mine", WEIGHTS)
    assert mine(torch.tensor([1.0, 2.0]), 0.5).tolist() == [0.5, 1.0]


def test_a_weight_of_true_and_false_is_one_of_1_and_0(write):
    path = write("def mine(margin, beta):\n    return margin < beta\n")
    got = load_weight(f"{path}:mine", WEIGHTS)(torch.tensor([0.0, 1.0]), 0.1)
    assert got.tolist() == [1, 0] and got.dtype == torch.float32, "of the margin's dtype"


@pytest.mark.parametrize("body, message", [
    ("margin.mean()", r"margin's shape \(3,\), got \(\)"),
    ("margin[:, None]", r"margin's shape \(3,\), got \(3, 1\)"),
    ("None", r"got NoneType"),
    ("1 / margin", r"got inf at margin 0"),
])
def test_a_weight_with_a_wrong_result_is_named_with_its_file_and_line(write, body, message):
    path = write(f"'''Weights.'''\n\n\ndef mine(margin, beta):\n    return {body}\n")
    with pytest.raises(UserError, match=message) as error:
        load_weight(f"{path}:mine", WEIGHTS)
    assert str(error.value).startswith(f"{path}:4 (mine)"), error.value


def test_an_unknown_weight_lists_the_known_ones():
    for spec in ("sigmoidal", "", "weights.py", "sigmoid:"):
        with pytest.raises(UserError, match="unknown weight.*sigmoid, constant.*file.py:function"):
            load_weight(spec, WEIGHTS)


# --- Functions that replace the core's ---

def test_a_student_s_function_is_what_the_core_s_other_functions_call(core, write):
    before = core.mean_loss([0.0, 0.0], 1.0)
    path = write("def helper():\n    return 7\n\n"
                 "def loss(x, beta):\n    return helper() + beta\n")
    with own_code(core, path):
        assert before == 1 and core.mean_loss([0.0, 0.0], 1.0) == 8
        assert not hasattr(core, "helper"), "it is the student's own affair"
    assert core.mean_loss([0.0, 0.0], 1.0) == before, "the core's own again"


def test_only_functions_written_in_the_student_s_file_count(core, write):
    path = write("from math import exp, floor\nfrom statistics import mean as mean_loss\n"
                 "def loss(x, beta): return 0\n"
                 "def main(argv, more): pass  # a script of its own\n")
    assert own_functions(core, path).keys() == {"loss"}, "no import, and no main"
    assert core.loss(0.0, 1.0) == 1, "own_functions replaces nothing"


@pytest.mark.parametrize("code, message", [
    ("loss = 3", "defines no function of core.py"),
    ("def main(): pass", "defines no function of core.py"),
    ("\ndef loss(beta, x): pass", r"mine.py:2: loss must take \(x, beta\), it takes \(beta, x\)"),
    ("\n1 / 0", r"mine.py:2 raised ZeroDivisionError: division by zero; correct it"),
    ("def loss(:", r"mine.py:1 raised SyntaxError"),
    ("import no_such_package", r"mine.py:1 raised ModuleNotFoundError"),
    ("import sys\nsys.exit()", r"mine.py:2 raised SystemExit"),
])
def test_a_file_that_cannot_replace_anything_says_why(core, write, code, message):
    with pytest.raises(UserError, match=message), own_code(core, write(code)):
        pass
    assert core.loss(0.0, 1.0) == 1, "and nothing is replaced"


@pytest.mark.parametrize("code, message", [
    ("return [][x]", r"mine.py:3 raised TypeError: list indices"),
    ("return helper()", r"mine.py:6 raised KeyError: 'no such key'"),  # the line, not the call's
    ("raise SystemExit(0)", r"mine.py:3 raised SystemExit: 0"),
    ("return None", r"core.py:8 raised TypeError"),  # where the core meets a wrong result
])
def test_what_a_student_s_function_raises_is_named_with_its_line(core, write, code, message):
    path = write(f"\ndef loss(x, beta):\n    {code}\n\n"
                 "def helper():\n    return {}['no such key']\n")
    with own_code(core, path), pytest.raises(UserError, match=message):
        blamed(core.mean_loss, path)([0.0, 1.0], 1.0)
    assert core.loss(0.0, 1.0) == 1, "the core's own again"


def test_what_is_not_a_student_s_fault_is_no_sentence(core, write):
    path = write("def loss(x, beta):\n    return None\n")
    with own_code(core, path), pytest.raises(TypeError):
        core.mean_loss([0.0, 1.0], 1.0)  # where the core is not said to meet the student's results
    for error in MemoryError(), torch.OutOfMemoryError("CUDA"), KeyboardInterrupt():
        def fails():
            raise error
        with pytest.raises(type(error)):
            blamed(fails, path)()
