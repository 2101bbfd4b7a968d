"""Every import in the package points downwards: the files are parsed, whoever would run the line.

An import counts wherever it stands: at the top, inside a function, under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybrid.strategies.registry import NAMES
from tests.conftest import ROOT

# A file imports only from the rows below its own. A folder named here is one unit, whose files may
# import each other; no other files of one row may.
ROWS = """
__init__ __main__
cli
exit_status
doctor
compare train progress sample
prepare evaluate report parity launch rank weights measure
preflight trackers
strategies.registry
strategies.single strategies.ddp strategies.local_sgd strategies.fsdp \
    strategies.zero1 strategies.zero2 strategies.zero3 strategies.pipeline strategies.two_d
strategies._accelerate_engine strategies._stages strategies._replicas
strategies._accelerate strategies._cut strategies._pipe
strategies._deepspeed
strategies._partition strategies._ds_config strategies._torch strategies._optimizer \
    strategies._model
strategies._precision
strategies.base
strategies._preflight
data models
jit_cache
importing schedule processes job_file rank_log known_keys
threads
launchers accelerate_launch user_files
config
layout records tolerances liveness environment
"""
# These libraries are imported in these files alone, and there inside functions.
HOMES = {
    "accelerate": ("strategies._accelerate", "trackers"),
    "deepspeed": ("strategies._deepspeed", "strategies._pipe"),
}
# The files that import by a name in a string, which no parser follows.
BY_NAME = ("__init__", "importing", "strategies.registry")
# The one loop and the one evaluation ask no strategy who it is.
BLIND = ("train", "evaluate")

LEVEL = {u: i for i, row in enumerate(ROWS.strip().splitlines()) for u in row.split()}


def unit_of(module: str) -> str:
    """The name in the table that a dotted module lies under; itself where there is none."""
    parts = module.split(".")
    heads = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((head for head in heads if head in LEVEL), module)


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


def broken_rule(unit: str, package: Path, name: str, at_top: bool) -> str | None:
    """The rule that an import of `name` in a file of `unit` breaks."""
    root, _, module = name.partition(".")
    if root in HOMES:
        if unit not in HOMES[root]:
            return f"{root} is imported only in {' and '.join(HOMES[root])}"
        return f"{root} is imported only inside functions" if at_top else None
    if root != package.name:
        return None
    target = unit_of(module or "__init__")
    if target not in LEVEL:
        return f"imports {target}, which has no row in the table"
    if target == unit and package.joinpath(*unit.split(".")).is_dir():
        return None
    if LEVEL[target] > LEVEL[unit]:
        return None
    return f"{unit} imports {target}, which is not in a row below it"


def problems_of(package: Path, file: Path) -> Iterator[str]:
    """What is wrong in one file, as `path:line: rule`."""
    shown = file.relative_to(package.parent)
    parts = file.relative_to(package).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)
    unit, tree = unit_of(module), ast.parse(file.read_text())
    if unit not in LEVEL:
        yield f"{shown}:1: {unit} has no row in the table"
        return
    top = top_level_lines(tree)
    for line, name in imports_of(package, file, tree):
        if rule := broken_rule(unit, package, name, line in top):
            yield f"{shown}:{line}: {rule}"
    for node in ast.walk(tree):
        called = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
        if called in ("import_module", "__import__") and unit not in BY_NAME:
            yield f"{shown}:{node.lineno}: imports by name, which only {', '.join(BY_NAME)} may"
        if unit in BLIND and isinstance(node, ast.Constant) and node.value in NAMES:
            yield f"{shown}:{node.lineno}: {unit} names the strategy {node.value!r}"


def problems(package: Path) -> list[str]:
    """What is wrong in all files of a package."""
    return [p for file in sorted(package.rglob("*.py")) for p in problems_of(package, file)]


def test_imports_point_downwards() -> None:
    found = problems(ROOT / "hybrid")
    assert not found, "\n" + "\n".join(found)


def test_the_table_names_only_what_there_is() -> None:
    gone = [unit for unit in LEVEL if not own_module(ROOT / "hybrid", unit)]
    assert not gone


def test_every_strategy_has_its_row() -> None:
    row = LEVEL["strategies.single"]
    assert sum(level == row for level in LEVEL.values()) == len(NAMES)


PLANTED = {
    "upwards": ("layout", "from .config import Job", "layout imports config"),
    "sideways": (
        "strategies/ddp",
        "\nfrom . import fsdp",
        "strategies.ddp imports strategies.fsdp",
    ),
    "one name of another": ("strategies/ddp", "from .fsdp import build", "imports strategies.fsdp"),
    "absolute": ("config", "import hybrid.cli", "config imports cli"),
    "absolute from": ("config", "from hybrid import records, cli", "config imports cli"),
    "in a function": ("records", "def f():\n    from . import layout", "records imports layout"),
    "for types": ("base", "", "base has no row"),
    "under TYPE_CHECKING": (
        "schedule",
        "if TYPE_CHECKING:\n    from .data import x",
        "imports data",
    ),
    "measuring": ("strategies/_torch", "from ..measure import comm", "imports measure"),
    "evaluating": ("strategies/fsdp", "from ..evaluate import evaluate", "imports evaluate"),
    "the whole package": ("data/random", "from hybrid import load_job", "imports __init__"),
    "another's library": ("strategies/fsdp", "def f():\n    import accelerate", "_accelerate"),
    "library early": ("strategies/_deepspeed", "import deepspeed.pipe", "inside functions"),
    "library in a try": (
        "strategies/_accelerate",
        "try:\n    from accelerate import Accelerator\nexcept ImportError:\n    pass",
        "inside functions",
    ),
    "by name": ("models/mlp", "importlib.import_module('hybrid.cli')", "imports by name"),
    "a name in the loop": ("train", "if strategy == 'fsdp':\n    pass", "names the strategy"),
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
        "strategies/_accelerate": "def f():\n    from accelerate import Accelerator",
        "strategies/registry": "importlib.import_module('.single', __package__)",
        "train": "def f():\n    from .strategies import registry",
    }
    for file, text in allowed.items():
        (package / f"{file}.py").write_text(text)
    assert problems(package) == []
