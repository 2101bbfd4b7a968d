"""Every import in the package points downwards: the files are parsed, whoever would run the line.

An import counts wherever it stands: at the top, inside a function, under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.strategies.registry import NAMES
from tests.conftest import ROOT

# A package imports only from the rows below its own, and in its own row from packages to its right:
# one order of all packages, written in rows. Files of one package may import each other.
ROWS = """
__init__ __main__
cli doctor
comparison training report
strategies
engines
stages models data checkpoint measure
launch job
layout records
"""
# Strategies never import each other: they share by calling what lies below.
STRATEGIES = ("single", "ddp", "local_sgd", "fsdp", "zero", "pipeline", "two_d")
# These libraries are imported in these files alone, and there inside functions.
HOMES = {
    "accelerate": ("engines.accelerator", "training.trackers"),
    "deepspeed": ("engines.deepspeed_setup", "engines.pipeline_instructions", "engines.zero"),
}
# The files that import by a name in a string, which no parser follows.
BY_NAME = ("__init__", "job.imports", "strategies.registry")
# The one loop and the one evaluation ask no strategy who it is.
BLIND = ("training.loop", "training.evaluation")

ORDER = [unit for row in ROWS.strip().splitlines() for unit in row.split()]


def unit_of(module: str) -> str:
    """The package, or the file at the root, that a dotted module lies in."""
    return module.partition(".")[0]


def own_module(package: Path, module: str) -> bool:
    """Whether a dotted name is a file or a folder of the package."""
    path = package.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports_of(package: Path, file: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file imports."""
    folder = [package.name, *file.relative_to(package).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            inside = source.partition(".")[2]
            for alias in node.names:
                module = f"{inside}.{alias.name}".lstrip(".")
                found = source.startswith(package.name) and own_module(package, module)
                yield node.lineno, f"{source}.{alias.name}" if found else source


def top_level_lines(tree: ast.Module) -> set[int]:
    """Lines of the imports that run when the file is imported, under an `if` or a `try` too."""
    lines, pending = set(), list[ast.AST](tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            lines.add(node.lineno)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return lines


def broken_rule(module: str, package: Path, name: str, at_top: bool) -> str | None:
    """The rule that an import of `name` in the file `module` breaks."""
    root, _, target = name.partition(".")
    if root in HOMES:
        if module not in HOMES[root]:
            return f"{root} is imported only in {' and '.join(HOMES[root])}"
        return f"{root} is imported only inside functions" if at_top else None
    if root != package.name:
        return None
    here, there = unit_of(module), unit_of(target or "__init__")
    if there not in ORDER:
        return f"imports {there}, which has no row in the table"
    of_strategy = [m.removeprefix("strategies.") for m in (module, target)]
    if of_strategy[0] in STRATEGIES and of_strategy[1] in STRATEGIES:
        return f"{module} imports {target}: strategies never import each other"
    if here == there or ORDER.index(there) > ORDER.index(here):
        return None
    return f"{here} imports {there}, which is not below it"


def problems_of(package: Path, file: Path) -> Iterator[str]:
    """What is wrong in one file, as `path:line: rule`."""
    shown = file.relative_to(package.parent)
    parts = file.relative_to(package).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)
    tree = ast.parse(file.read_text())
    if unit_of(module) not in ORDER:
        yield f"{shown}:1: {unit_of(module)} has no row in the table"
        return
    top = top_level_lines(tree)
    for line, name in imports_of(package, file, tree):
        if rule := broken_rule(module, package, name, line in top):
            yield f"{shown}:{line}: {rule}"
    for node in ast.walk(tree):
        called = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        if called in ("import_module", "__import__") and module not in BY_NAME:
            yield f"{shown}:{node.lineno}: imports by name, which only {', '.join(BY_NAME)} may"
        if module in BLIND and isinstance(node, ast.Constant) and node.value in NAMES:
            yield f"{shown}:{node.lineno}: {module} names the strategy {node.value!r}"


def problems(package: Path) -> list[str]:
    """What is wrong in all files of a package."""
    return [p for file in sorted(package.rglob("*.py")) for p in problems_of(package, file)]


def test_imports_point_downwards() -> None:
    found = problems(ROOT / "hybrid")
    assert not found, "\n" + "\n".join(found)


def test_the_table_names_only_what_there_is() -> None:
    gone = [unit for unit in ORDER if not own_module(ROOT / "hybrid", unit)]
    assert not gone and len(ROWS.strip().splitlines()) <= 8


def test_an_installed_package_has_every_folder() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "hybrid").rglob("*.py")}
    assert sorted({".".join(folder.parts) for folder in folders} | {"hybrid.ds_configs"}) == listed


def test_every_strategy_is_known_here() -> None:
    there = {file.stem for file in (ROOT / "hybrid" / "strategies").glob("*.py")}
    assert there == {*STRATEGIES, "__init__", "protocol", "registry"}


def test_no_files_import_each_other() -> None:
    """Inside a package too: what runs at import forms no cycle."""
    package = ROOT / "hybrid"
    needs: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text())
        top = top_level_lines(tree)
        parts = file.relative_to(package).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found = {name for line, name in imports_of(package, file, tree) if line in top}
        needs[f"hybrid.{module}".rstrip(".")] = found
    while free := [m for m, found in needs.items() if not found & (needs.keys() - {m})]:
        for module in free:
            del needs[module]
    assert not needs


PLANTED = {
    "upwards": ("layout", "from .job.schema import Job", "layout imports job"),
    "to the left": ("report/table", "from ..training import loop", "report imports training"),
    "sideways": ("strategies/ddp", "\nfrom . import fsdp", "strategies never import each other"),
    "one name of another": (
        "strategies/ddp",
        "from .fsdp import build",
        "strategies.ddp imports strategies.fsdp",
    ),
    "absolute": ("job/schema", "import hybrid.cli", "job imports cli"),
    "absolute from": ("job/schema", "from hybrid import records, cli", "job imports cli"),
    "in a function": ("records", "def f():\n    from . import layout", "records imports layout"),
    "for types": ("base", "", "base has no row"),
    "under TYPE_CHECKING": (
        "job/file",
        "if TYPE_CHECKING:\n    from ..data import x",
        "job imports data",
    ),
    "measuring": ("measure/clock", "from ..engines import tally", "measure imports engines"),
    "evaluating": (
        "strategies/fsdp",
        "from ..training.evaluation import evaluate",
        "imports training",
    ),
    "the whole package": ("data/random", "from hybrid import load_job", "imports __init__"),
    "another's library": ("strategies/fsdp", "def f():\n    import accelerate", "accelerator"),
    "library early": ("engines/zero", "import deepspeed.pipe", "inside functions"),
    "library in a try": (
        "engines/accelerator",
        "try:\n    from accelerate import Accelerator\nexcept ImportError:\n    pass",
        "inside functions",
    ),
    "by name": ("models/mlp", "importlib.import_module('hybrid.cli')", "imports by name"),
    "a name in the loop": (
        "training/loop",
        "if strategy == 'fsdp':\n    pass",
        "names the strategy",
    ),
}


def copy_names(folder: Path) -> Path:
    """A package of the same file names, all empty."""
    package = folder / "hybrid"
    for file in (ROOT / "hybrid").rglob("*.py"):
        empty = package / file.relative_to(ROOT / "hybrid")
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
    return package


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_import_is_caught(case: str, tmp_path: Path) -> None:
    file, text, words = PLANTED[case]
    package = copy_names(tmp_path)
    assert problems(package) == []
    (package / f"{file}.py").write_text(text)
    (found,) = problems(package)
    line = next((i for i, t in enumerate(text.splitlines(), 1) if "import" in t), 1)
    line = 2 if case == "library in a try" else line
    assert found.startswith(f"hybrid/{file}.py:{line}: ") and words in found


def test_imports_downwards_and_inside_a_package_are_let_through(tmp_path: Path) -> None:
    package = copy_names(tmp_path)
    allowed = {
        "models/mlp": "from .losses import Loss",
        "report/__init__": "from .page import html",
        "engines/accelerator": "def f():\n    from accelerate import Accelerator",
        "comparison/session": "from ..training.run import launch",
        "strategies/registry": "importlib.import_module('.single', __package__)",
        "training/loop": "def f():\n    from ..strategies import registry",
    }
    for file, text in allowed.items():
        (package / f"{file}.py").write_text(text)
    assert problems(package) == []
