"""The rules of CONTRIBUTING.md: which files there are, and which module may import which."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ("gpt", "dpo", "data_imdb", "plot_frontier")
FLOORS = [{"support"}, set(CORE), {"evaluate", "reward"}, {"job"}, {"train"}, {"experiments"}]


def floor(module: str) -> int:
    """The module's row in FLOORS. A module may import from its own row and from earlier rows."""
    return next(i for i, names in enumerate(FLOORS) if module.partition(".")[0] in names)


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("experiments/*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def imports(path: Path, known) -> set[str]:
    """The modules of the project that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & known or {node.module}
    return found & known


HOUSE = modules()
IMPORTS = {name: imports(path, HOUSE.keys()) for name, path in HOUSE.items()}


def test_only_these_eight_modules_are_at_the_top():
    top = {name for name in HOUSE if "." not in name}
    assert top == {*CORE, "evaluate", "reward", "job", "train"}


@pytest.mark.parametrize("name", HOUSE)
def test_a_module_imports_only_from_its_own_and_earlier_rows(name):
    wrong = {other for other in IMPORTS[name] if floor(other) > floor(name)}
    assert not wrong, f"{name} imports {sorted(wrong)}, which are in a later row"


def test_imports_form_no_circle():
    done = set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in HOUSE:
        visit(name, [])


def test_every_module_has_its_test_file():
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    beside = {"test_house", "test_mistakes", "test_readme", "test_exercises"}
    wanted = {f"test_{name.rpartition('.')[2]}" for name in HOUSE if "__" not in name}
    assert tests - beside == wanted


def test_the_core_and_support_need_only_the_owners_packages():
    """torch, numpy, tiktoken, matplotlib and tqdm. Other packages are imported inside functions."""
    allowed = {"torch", "numpy", "tiktoken", "matplotlib", "tqdm", "regex",  # tiktoken needs regex
               *sys.stdlib_module_names, *(name.partition(".")[0] for name in HOUSE)}
    for name, path in HOUSE.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {n.partition(".")[0] for n in names} <= allowed, f"{name} imports {names}"
