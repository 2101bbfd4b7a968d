"""README.md and docs/ tell the truth: each of their commands and examples runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

import hybrid
from hybrid.cli import app
from tests.conftest import ROOT
from tests.documents import BLOCKS, DOCUMENTS, FILES, commands, of_language, page_text, write_files

COMMANDS = commands(DOCUMENTS)
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
    "hybrid train out/compare/ddp/job.json --strategy ddp --nproc 2 --out out/again": (
        "test_reading.py holds it against the files of a real comparison"
    ),
}
SLOW = {
    "torchrun --nproc-per-node 2 -m hybrid": "one more launcher: 10 s",
    "hybrid compare": "three runs: 20 s",
}


def to_run() -> Iterator[Any]:
    """The commands to run, each a parameter."""
    for command in COMMANDS:
        if command not in NOT_RUN:
            slow = any(command.startswith(start) for start in SLOW)
            yield pytest.param(command, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("command", list(to_run()))
def test_command_runs(command: str, tmp_path: Path) -> None:
    write_files(tmp_path)
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


def test_every_command_left_out_is_in_the_documents() -> None:
    assert set(NOT_RUN) <= set(COMMANDS)
    assert all(any(command.startswith(start) for command in COMMANDS) for start in SLOW)


def test_first_commands_are_targets_of_the_makefile() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert COMMANDS[:3] == ["make demo", "make demo-gpt", "make test"]
    assert of_language("bash")[0].text.splitlines() == COMMANDS[:3]
    assert {"demo", "demo-gpt", "test", "check"} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    theirs = commands([ROOT / "CONTRIBUTING.md"])
    assert theirs and {command.removeprefix("make ") for command in theirs} <= set(targets)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_example_is_in_the_documents_and_run(file: Path) -> None:
    path = file.relative_to(ROOT)
    shown = f"`{path}`:\n\n```python\n{file.read_text()}```"
    assert shown in page_text("docs/python-api.md")
    assert any(str(path) in command for command in COMMANDS)


def test_every_block_is_one_that_a_test_runs() -> None:
    assert {block.language for block in BLOCKS} == {"bash", "python", "toml", "text"}
    fences = sum(len(re.findall(r"^ *```", p.read_text(), re.M)) for p in DOCUMENTS)
    assert fences == 2 * len(BLOCKS)
    run = {
        *(file.read_text() for file in EXAMPLES),
        (ROOT / "tests" / "toy_strategy.py").read_text(),  # by test_own_strategy.py
        *(FILES[name] for name in ("my_model.py", "my_loss.py", "my_collate.py")),
    }
    # test_reading.py runs the snippet of its page, and prints the texts; test_inspect.py runs that
    # of the page on checkpoints.
    own = {"checkpoints.md", "reading-a-comparison.md"}
    other = [b for b in of_language("python") if b.text not in run]
    assert [block.page for block in other] == sorted(own)
    # Commands of launchers for a JOB of one's own stand on their page, as texts.
    assert {block.page for block in of_language("text")} == own | {"launchers.md"}
    # test_documents.py loads the job with every key; the sections of a job are loaded below.
    pages = {"job-file.md", "checkpoints.md"}
    assert [b.file for b in of_language("toml") if b.page not in pages] == ["my_job.toml"]


CHECKPOINTS = [block for block in BLOCKS if block.page == "checkpoints.md"]


def test_sections_of_a_job_on_the_page_on_checkpoints_load() -> None:
    found = [tomllib.loads(block.text) for block in CHECKPOINTS if block.language == "toml"]
    assert [[*sections] for sections in found] == [["checkpoint"], ["guard"], ["model"]]
    for sections in found:
        assert hybrid.load_job({**tomllib.loads(FILES["my_job.toml"]), **sections}).warnings() == []


def test_commands_on_the_page_on_checkpoints_are_understood() -> None:
    """They need a run that was saved, so they are parsed here; other tests run their like."""
    texts = [block.text for block in CHECKPOINTS if block.language == "text"]
    lines = [line for text in texts for line in text.splitlines() if "hybrid: " not in line]
    commands_by_name = get_command(app).commands  # type: ignore[attr-defined]
    assert len(lines) == 6
    for line in lines:
        program, name, *arguments = shlex.split(line)
        assert program == "hybrid"
        commands_by_name[name].make_context(name, arguments)


def test_a_block_that_is_a_file_of_the_checkout_is_that_file() -> None:
    shown = {block.file: block.text for block in BLOCKS if block.file and "/" in block.file}
    assert len(shown) == len(EXAMPLES) + 1
    assert all((ROOT / name).read_text() == text for name, text in shown.items())


def test_own_job_of_the_readme_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(FILES) == {"my_model.py", "my_job.toml", "my_loss.py", "my_collate.py"}
    assert any(command.startswith("hybrid compare my_job.toml") for command in COMMANDS)
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    job = hybrid.load_job("my_job.toml")
    assert job.warnings() == [] and job.model.name == "my_model:build_model"


def test_own_loss_is_a_sum_and_a_count() -> None:
    defined: dict[str, Any] = {}
    exec(FILES["my_loss.py"], defined)
    output, target = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
    total, count = defined["squared_error"](output, target)
    mean = torch.nn.functional.mse_loss(output, target)
    assert count == 6 and float(total / count) == pytest.approx(float(mean))


def test_own_collate_pads_to_the_longest() -> None:
    defined: dict[str, Any] = {}
    exec(FILES["my_collate.py"], defined)
    samples = [(torch.ones(3), torch.tensor(1)), (torch.ones(5), torch.tensor(0))]
    words, classes = defined["collate"](samples)
    assert words.shape == (2, 5) and words.sum() == 8 and classes.tolist() == [1, 0]
