"""Laws of the exercises' checks: the solution passes, a stub fails, each wrong answer is named.

A check is called here as pytest would call it, in this process. A few tests start pytest itself.
"""

import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo
from support.settings import parse
from support.student import own_functions

ROOT = Path(dpo.__file__).parent
HERE = ROOT / "exercises"
sys.path.insert(0, str(HERE))

from grading import implementation
from mutants import MUTANTS
from solutions import SOLUTIONS

NUMBERS = [f"{n:02}" for n in range(1, 13)]
FILES = {n: next(HERE.glob(f"ex{n}_*.py")) for n in NUMBERS}
STUBS = {n: importlib.import_module(file.stem) for n, file in FILES.items()}
README = (HERE / "README.md").read_text(encoding="utf-8")


def named_check(name: str) -> tuple[str, str]:
    """The check that a mutant's docstring names, and words of its message."""
    return re.search(r'Caught by (test_\w+): "([^"]+)"', MUTANTS[name].function.__doc__).groups()


def checks(number: str) -> dict:
    module = importlib.import_module(f"test_ex{number}")
    return {name: f for name, f in vars(module).items() if name.startswith("test_")}


def outcome(check, impl, seed: int, runs: Path) -> str | None:
    """None where the check passes, else its message."""
    given = dict(impl=impl, rng=torch.Generator().manual_seed(seed), runs=runs)
    try:
        check(**{name: given[name] for name in inspect.signature(check).parameters})
    except Exception as error:
        return str(error)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """What --stage degenerate, four values of β and four kinds of labels leave behind, in small."""
    folder = tmp_path_factory.mktemp("toy")
    start = dict(kl=0.0, ref_ppl=3.5, reward=0.5, grammatical=0.96, eos=1.0, repetition=0.01,
                 logp_chosen=-40.0, logp_rejected=-42.0, step=0, seed=0)
    end = dict(start, step=150)
    rows = [dict(start, weight="sigmoid"), dict(start, weight="constant"),
            dict(end, weight="sigmoid", kl=13.0, ref_ppl=4.7, grammatical=0.67, logp_chosen=-48.0,
                 logp_rejected=-75.0, reward=0.83),
            dict(end, weight="constant", kl=194.0, ref_ppl=253.0, grammatical=0.16,
                 logp_chosen=-92.0, logp_rejected=-160.0, reward=0.83)]
    (folder / "degenerate").mkdir()
    (folder / "degenerate" / "degenerate.json").write_text(json.dumps(rows))
    for beta, kl in zip(STUBS["08"].BETAS, (1.8, 1.2, 0.8, 0.4)):
        run = folder / ("dpo" if beta == 0.5 else f"dpo-beta{beta}")
        run.mkdir()
        (run / "config.json").write_text(json.dumps(dict(settings=dict(beta=beta))))
        (run / "result.json").write_text(json.dumps(dict(kl=kl, kl_se=0.03, reward=0.7,
                                                         reward_se=0.01)))
    for run, kl in zip(STUBS["12"].RUNS.values(), (3.5, 2.1, 1.2, 0.9)):
        (folder / run).mkdir()
        (folder / run / "result.json").write_text(json.dumps(dict(kl=kl, kl_se=0.1, reward=0.7,
                                                                  reward_se=0.01)))
    return folder


def is_dpos(f) -> bool:
    return inspect.isfunction(f) and f is getattr(dpo, f.__name__, None)


def holes(number: str) -> set[str]:
    """What a student fills in: constants that are None, and functions that raise."""
    return {name for name, value in vars(STUBS[number]).items()
            if value is None and name.isupper() or inspect.isfunction(value)
            and f'raise NotImplementedError("exercise {number}: ' in inspect.getsource(value)}


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_fills_each_hole_with_dpos_own(number):
    solution = SOLUTIONS[number]
    assert set(solution) == holes(number), "the solution and the exercise differ in their names"
    for name, f in solution.items():
        if inspect.isfunction(getattr(dpo, name, None)):
            assert is_dpos(f), f"exercise {number}: {name} is a second copy of dpo.{name}"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_passes_for_every_student_number(number, runs):
    for seed in range(10):
        for name, check in checks(number).items():
            message = outcome(check, implementation(number, "solution"), seed, runs)
            assert message is None, f"test_ex{number}.{name}, --seed {seed}: {message}"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_untouched_stub_fails_every_check(number, runs):
    for name, check in checks(number).items():
        message = outcome(check, implementation(number, "student"), 0, runs)
        assert message and message.startswith(f"exercise {number}: "), \
            f"test_ex{number}.{name} says {message!r} of a hole that is still open"


@pytest.mark.parametrize("name", MUTANTS)
def test_each_wrong_answer_is_named(name, runs):
    number, (wanted, words) = MUTANTS[name].exercise, named_check(name)
    for seed in range(5):
        impl = implementation(number, f"mutant:{name}")
        said = {check: outcome(f, impl, seed, runs) for check, f in checks(number).items()}
        failed = [check for check, message in said.items() if message]
        assert failed and failed[0] == wanted, f"--seed {seed}: {wanted} should be the first to " \
            f"fail, but {failed} did"
        assert words in said[wanted], f"--seed {seed}: {words!r} is not in: {said[wanted]}"


def test_each_check_is_the_best_diagnosis_of_a_wrong_answer():
    named = {(MUTANTS[name].exercise, named_check(name)[0]) for name in MUTANTS}
    idle = {(n, name) for n in NUMBERS for name in checks(n)} - named
    assert not idle, f"no wrong answer is caught best by {sorted(idle)}: add one, or cut the check"


@pytest.mark.parametrize("number, command", [
    ("06", "python train.py --preset toy --stage degenerate"),
    ("08", "python train.py --preset toy --stage dpo --beta 0.25"),
    ("12", "python train.py --preset toy --stage dpo --beta 0.5 --dpo-steps 300")])
def test_a_missing_measurement_says_what_to_run(number, command, tmp_path):
    said = [outcome(check, implementation(number, "solution"), 0, tmp_path)
            for check in checks(number).values()]
    assert [s for s in said if s and s.startswith(f"exercise {number}: ") and command in s], said


@pytest.mark.parametrize("beta, passes", [(1.15, True), (1.6, False)])
def test_two_points_within_their_errors_have_no_order(runs, tmp_path, beta, passes):
    """The order 1.2 > 0.8 of β 0.5 and 1, with the second moved to `beta` nats."""
    for folder in runs.glob("dpo*"):
        copy = tmp_path / folder.name
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_text(file.read_text())
    path = tmp_path / "dpo-beta1.0" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(kl=beta)))
    check = checks("08")["test_the_measurement_agrees"]
    assert (outcome(check, implementation("08", "solution"), 0, tmp_path) is None) == passes


def test_what_was_measured_is_shown_after_the_prediction(runs, tmp_path):
    for number in "08", "12":
        with pytest.raises(SystemExit, match=f"exercise {number}: PREDICTION is None"):
            STUBS[number].main()
    STUBS["08"].draw(STUBS["08"].measured(runs), tmp_path / "ex08.png")
    assert (tmp_path / "ex08.png").stat().st_size > 1000


@pytest.mark.parametrize("number", NUMBERS)
def test_the_header_has_the_five_lines(number):
    lines = STUBS[number].__doc__.splitlines()
    assert lines[0].startswith(f"Exercise {number} · ")
    names = [line.split(":")[0] for line in lines[2:7]]
    assert names == ["Equation", "Kind", "Time", "Machine", "Check"], names
    assert set(re.findall(r"[A-Z]{4,}", lines[3])) & {"WRITE", "PREDICT", "SWEEP", "ACCOUNT"}
    assert re.search(rf"python -m pytest exercises/test_ex{number}.py .*--tb=short", lines[6])
    assert "(an estimate)" in lines[4] and "CPU" in lines[5]


def test_the_teachers_page_is_right():
    rows = re.findall(r"^\| `(ex(\d\d)_\w+\.py)` \| ([A-Z, ]+) \|.*\| (\d+) \| (\d+) \|$",
                      README, re.M)
    assert [row[1] for row in rows] == NUMBERS, "the table lists each exercise once, in order"
    for file, number, kinds, minutes, n in rows:
        header = STUBS[number].__doc__.splitlines()
        assert file == FILES[number].name
        assert set(kinds.split(", ")) == set(re.findall(r"[A-Z]{4,}", header[3])), number
        assert int(minutes) == int(header[4].split()[1]), f"{number}: minutes, table and header"
        assert int(n) == len(checks(number)), f"{number} has {len(checks(number))} checks"
    assert all("--tb=" in line for line in README.splitlines() if "-m pytest" in line)
    for title, total in ("Fifty minutes", 50), ("Three hours", 180):
        plan = README.split(f"## {title}\n")[1].split("\n## ")[0]
        assert sum(map(int, re.findall(r"^\| (\d+) \|", plan, re.M))) == total, title


def test_every_command_parses():
    texts = [README, *(stub.__doc__ for stub in STUBS.values())]
    commands = {c for text in texts for c in re.findall(r"python (train\.py [^`\n]+)", text)}
    assert len(commands) >= 9
    for command in commands:
        *_, cfg = parse(shlex.split(command)[1:], cuda=False)
        for spec in cfg.dpo_module, cfg.weight:
            file, _, name = spec.partition(":")
            if file.endswith(".py"):
                assert (ROOT / file).exists(), command
                assert not name or name in holes(Path(file).stem[2:4]), command


def test_signatures_let_a_students_file_stand_in():
    theirs = {n: {name for name in holes(n) if inspect.isfunction(getattr(dpo, name, None))}
              for n in NUMBERS}
    assert all(theirs[n] for n in ("01", "02", "03", "04", "05", "07", "09", "11"))
    for number in NUMBERS:
        if theirs[number]:
            assert set(own_functions(dpo, str(FILES[number]))) == theirs[number]


@pytest.fixture
def graded(capsys, monkeypatch):
    """graded(words of a command after pytest) -> what it prints."""
    def run(*words: str) -> str:
        monkeypatch.chdir(ROOT)
        pytest.main([*words, "-p", "no:cacheprovider"])
        return capsys.readouterr().out
    return run


@pytest.mark.parametrize("options, marks, words", [
    (["--impl", "solution", "--seed", "7"], "11 of 11", "11 passed"),
    ([], "0 of 11", "exercise 03: write Eq. 7"),  # the student, before a line is written
    (["--impl", "mutant:no_reference", "-x"], "1 of 11", "is π_ref in the loss?"),
    (["--impl", "nobody"], "0 of 11", "--impl is student, solution or mutant:NAME")])
def test_the_options_reach_the_checks(options, marks, words, graded):
    said = graded("exercises/test_ex03.py", "-q", "--tb=short", *options)
    assert words in said and f"exercise 03: {marks}\n" in said, said


def test_the_message_comes_before_any_other_line_of_the_traceback(graded):
    for mutant, number in ("beta_outside", "03"), ("one_word_for_09", "09"):
        said = graded(f"exercises/test_ex{number}.py", "-q", "-x", "--tb=short", "--impl",
                      f"mutant:{mutant}").split("= FAILURES =")[1].split("\n")
        assert "grading.py" not in "".join(said), "a helper's lines are shown"
        first = next(i for i, line in enumerate(said) if line.startswith("E  "))
        assert first <= 7 and named_check(mutant)[1] in " ".join(said[first:]), said


def test_marking_as_documented_gives_full_marks(graded, tmp_path):
    """In a fresh clone, where nothing was trained that a prediction is compared with."""
    command, = re.findall(r"^python -m pytest (exercises .*)$", README, re.M)
    said = graded(*shlex.split(command), "--impl", "solution", "--runs", str(tmp_path))
    total = re.search(r"That is (\d+) for the checks", README)[1]
    assert f"all: {total}\n" in said, said
    for number in "06", "08", "12":
        assert re.search(rf"exercise {number}: (\d+) of \1; the prediction was not measured", said)
    assert re.search(r"exercise 05: (\d+) of \1\n", said), "a confirmed prediction needs no note"


def test_a_file_that_cannot_be_imported_costs_its_own_marks_alone(tmp_path):
    folder = shutil.copytree(HERE, tmp_path / "exercises")
    (folder / FILES["07"].name).write_text("def preference_pairs(:")
    said = subprocess.run(
        [sys.executable, "-m", "pytest", folder / "test_ex02.py", folder / "test_ex07.py", "-q",
         "--tb=line", "--continue-on-collection-errors"], capture_output=True, text=True).stdout
    assert "exercise 02: 0 of 9\n" in said and "exercise 07: 0, its file cannot" in said, said
