"""The README tells the truth: its commands and examples run, its names are the package's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import hybrid
from hybrid.cli import app
from hybrid.config import Job
from hybrid.strategies import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# Of the Python API; what uses none of it is shown beside what it explains.
EXAMPLES = sorted(
    path
    for path in (ROOT / "launch" / "examples").glob("*.py")
    if "\nimport hybrid\n" in path.read_text()
)

INSTALLS = "sets up an environment; the Makefile's rule does it before these tests run"
NOT_RUN = {
    "make demo": "tests of the comparison run its job",
    "make demo-gpt": "takes minutes; tests of language models run what it runs",
    "make test": "is what runs this test",
    "python3 -m venv .venv": INSTALLS,
    ". .venv/bin/activate": INSTALLS,
    "pip install -e '.[demo,text,track,report,dev]'": INSTALLS,
}
SLOW = {
    "torchrun --nproc-per-node 2 -m hybrid": "one more launcher: 10 s",
    "hybrid compare": "two runs: 15 s",
}


def fenced(language: str) -> list[str]:
    """Texts of the README's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def section(title: str) -> str:
    """The README from one heading of level two to the next."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(text: str) -> list[str]:
    """What stands in backticks at the start of each row of a table."""
    return re.findall(r"^\| `([^`]+)`", text, re.M)


COMMANDS = [line for block in fenced("bash") for line in block.splitlines()]


def commands() -> Iterator[Any]:
    """The commands to run, each a parameter."""
    for command in COMMANDS:
        if command not in NOT_RUN:
            slow = any(command.startswith(start) for start in SLOW)
            yield pytest.param(command, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("command", list(commands()))
def test_command_runs(command: str, tmp_path: Path) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    ours = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,  # what it writes must not lie in the checkout
        env={**os.environ, "PATH": ours, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip(), "it shows nothing"


def test_every_command_left_out_is_in_the_readme() -> None:
    assert set(NOT_RUN) <= set(COMMANDS)
    assert all(any(command.startswith(start) for command in COMMANDS) for start in SLOW)


def test_first_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert fenced("bash")[0].splitlines() == ["make demo", "make demo-gpt", "make test"]
    assert {"demo", "demo-gpt", "test", "check"} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_is_in_the_readme_and_run(file: Path) -> None:
    path = file.relative_to(ROOT)
    assert f"`{path}`:\n\n```python\n{file.read_text()}```" in README
    assert any(str(path) in command for command in COMMANDS)


def test_no_python_but_the_examples() -> None:
    assert sorted(fenced("python")) == sorted(file.read_text() for file in EXAMPLES)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_paths_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    spans = re.findall(r"`([\w.-]+/[\w./-]*)`", text) + re.findall(r"\]\(([\w./-]+)\)", text)
    spans += [line.split()[0] for tree in fenced("text") for line in tree.splitlines()]
    made = ("out/", "OUT/", ".venv/", "logs/", "checkpoints/")
    named = {s for s in spans if not s.startswith(made) and "NAME" not in s}
    assert len(named) > 10
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def keys_of(kind: type[BaseModel], name: str = "") -> Iterator[tuple[str, str]]:
    """(section, key) of every value in the job, by the names that the file uses."""
    for attribute, field in kind.model_fields.items():
        key, inner = field.alias or attribute, field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from keys_of(inner, f"{name}.{key}".lstrip("."))
        else:
            yield name, key


def test_job_has_every_key_and_loads() -> None:
    (text,) = fenced("toml")
    assert text in section("The job file")
    everything = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", text, flags=re.M))
    found = set()
    for name, key in keys_of(Job):
        values: Any = everything
        for part in name.split("."):
            values = values[part]
        assert key in values, f"{name}.{key} is not in the README's job"
        found.add(name)
    assert found == set(re.findall(r"^\[([\w.]+)\]", text, re.M))
    job = hybrid.load_job(tomllib.loads(text))
    assert job.warnings() == []
    assert job.strategy == hybrid.config.Strategies(), "a value shown is not the default"


def test_tables_name_every_strategy_and_setting() -> None:
    text = section("Strategies")
    assert tuple(first_cells(text)) == registry.NAMES
    rows = {row.split("`")[1]: row for row in text.splitlines() if row.startswith("| `")}
    for name, key in keys_of(Job):
        strategy = name.removeprefix("strategy.")
        if strategy != name and key != "micro_batches":
            assert f"`{key}`" in rows[strategy], f"{name}.{key} is not in its row"


def test_tables_name_every_command_and_exit_status() -> None:
    text = section("Commands")
    ours = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert {cell.split()[1] for cell in first_cells(text)} == ours
    assert re.findall(r"^\| (\d) \|", text, re.M) == ["0", "1", "2", "3"]
