"""README.md, docs/ and the teacher's page against the code.

Every command parses, every file and function named exists, every equation's function opens with
it, and every number in the tables of results is in results/.
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
PAGES = {path: path.read_text() for path in (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"),
    ROOT / "exercises" / "README.md", ROOT / "results" / "README.md")}
README, TEXT = PAGES[ROOT / "README.md"], "\n".join(PAGES.values())
COMMANDS = [line for block in re.findall(r"^```\w*\n(.*?)^```", TEXT, re.S | re.M)
            for line in block.splitlines() if re.search(r"python|torchrun", line)]
MAP = re.findall(r"^\| ([^|]+) \| `(\w+)` \| `pytest -k (\w+)` \|", README, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_files_that_exist_and_flags_that_parse(command):
    words = shlex.split(command.split(" && ")[-1].split(" > ")[0], comments=True)
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
        assert number and number.group() in opening or re.search("gradient|App. B", where), \
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
        assert f"`{name}`" in TEXT or f"|{name}" in TEXT, f"no page names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_picture_exists(page):
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if not target.startswith("http"):
            file = page.parent / target.partition("#")[0]
            assert file.exists(), f"a link to {target}, which does not exist"


def test_readme_is_short():
    assert len(README.splitlines()) < 220


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/*.json")), ids=str)
def test_the_numbers_of_each_result_are_on_a_page(path):
    row = json.loads(path.read_text())
    for key in ("reward", "kl"):
        if path.name.startswith("result") and key in row:
            assert f"{row[key]:.3f}" in TEXT, f"{path}: no page has {key} {row[key]:.3f}"


def test_every_logged_name_of_the_metrics_page_is_logged():
    rows = [json.loads(line) for path in (ROOT / "results" / "toy").glob("metrics*.jsonl")
            for line in path.read_text().splitlines()]
    names = {key for row in rows for key in row} | {
        f"eval.{key}" for row in rows for key in row.get("eval", {})}
    page = PAGES[ROOT / "docs" / "metrics.md"]
    rows = re.findall(r"^\| (`.*?) \|", page[page.index("## metrics.jsonl"):], re.M)
    logged = re.findall(r"`([a-z_.0-9]+)`", " ".join(rows))
    assert len(logged) > 30
    for name in logged:
        assert name in names, f"the page explains {name}, which no step logs"
