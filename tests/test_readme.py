"""README against the code: a sentence that nothing runs is the sentence that goes wrong.

Every command parses, every file and function named exists, every equation's function opens with
it, every number in the tables of results is one that results/ holds. Under a second.
"""

import inspect
import json
import re
import shlex
from pathlib import Path

import pytest

import dpo
from experiments import theory
from support.settings import PRESETS, SETTINGS_OF, parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", README, re.S)
            for line in block.splitlines() if "python" in line]
MAP = re.findall(r"^\| ([^|]+) \| `(\w+)` \| `pytest -k (\w+)` \|", README, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_files_that_exist_and_flags_that_parse(command):
    words = shlex.split(command.split(" && ")[-1])
    script = next((w for w in words if w.endswith(".py")), None)
    if "-m" in words and "pytest" not in words:
        script = words[words.index("-m") + 1].replace(".", "/") + ".py"
    assert script is None or (ROOT / script).exists(), f"there is no {script}"
    for file in re.findall(r"-r (\S+)", command):
        assert (ROOT / file).exists(), f"there is no {file}"
    if script == "train.py":
        parse(words[words.index(script) + 1:], False)


def test_every_equation_s_function_opens_with_it_and_has_its_test():
    assert len(MAP) >= 20, f"the map has shrunk to {len(MAP)} rows"
    tests = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in ("dpo", "theory"))
    for where, name, key in MAP:
        module = dpo if hasattr(dpo, name) else theory
        opening = inspect.getdoc(getattr(module, name)).splitlines()[0]
        number = re.search(r"\d+$|Preferred-FT", where)
        assert number and number.group() in opening or "gradient" in where, \
            f"{name} should open with {where}, it opens with: {opening}"
        assert re.search(rf"def test_\w*{key}", tests), f"no test answers to pytest -k {key}"


def test_every_equation_of_dpo_is_on_the_map():
    opened = re.findall(r'def (\w+)\([^"]*?"""(Eq\. \d+|Lemma \d|Theorem \d|Proposition \d|'
                        r'Definition \d|Section 4|A\.3|C\.3|Preferred-FT) ·',
                        inspect.getsource(dpo) + inspect.getsource(theory))
    assert len(opened) >= 20
    missing = {name for name, _ in opened} - {name for _, name, _ in MAP}
    assert not missing, f"not on README's map: {missing}"


def test_every_file_of_the_project_is_on_the_file_map():
    listed = set(re.findall(r"`([\w/]+\.py)`", README))
    files = {str(path.relative_to(ROOT)) for folder in ("", "support", "experiments")
             for path in (ROOT / folder).glob("*.py") if "__" not in path.name}
    assert files <= listed, f"not in README: {files - listed}"
    for name in listed - files:
        assert (ROOT / name).exists(), f"README names {name}, which does not exist"


def test_every_preset_and_stage_is_named():
    for name in [*PRESETS, *SETTINGS_OF]:
        assert f"`{name}`" in README or f"|{name}" in README, f"README does not name {name}"


def test_every_link_and_picture_exists():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"README links to {target}, which does not exist"


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*.json")), ids=str)
def test_the_numbers_of_each_result_are_the_ones_in_readme(path):
    row = json.loads(path.read_text())
    for key in ("reward", "kl"):
        if path.name.startswith("result") and key in row:
            assert f"{row[key]:.3f}" in README, f"{path}: {key} {row[key]:.3f} is not in README"


def test_every_logged_name_of_the_metrics_page_is_logged():
    rows = [json.loads(line) for path in (ROOT / "results" / "toy").glob("metrics*.jsonl")
            for line in path.read_text().splitlines()]
    names = {key for row in rows for key in row} | {
        f"eval.{key}" for row in rows for key in row.get("eval", {})}
    page = README[README.index("## What is logged"):README.index("## Where we differ")]
    for name in re.findall(r"`([a-z_.0-9]+)`", page):
        if not name.endswith((".jsonl", ".png")) and name not in SETTINGS_OF:
            assert name in names, f"README explains {name}, which no step logs"
