"""A strategy from outside the package is taken by its module's name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hybrid
from hybrid.job.errors import JobError
from hybrid.job.file import to_dict
from hybrid.strategies import registry
from tests.conftest import ROOT, small_job

TOY = "tests.toy_strategy"
MINE = "mine.toy"  # the same file, in a folder where the command is typed


def test_a_toy_in_a_users_own_folder_is_compared_by_the_command(tmp_path: Path) -> None:
    text = (ROOT / "tests" / "toy_strategy.py").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "toy.py").write_text(text.replace(f'name = "{TOY}"', f'name = "{MINE}"'))
    (tmp_path / "job.json").write_text(json.dumps(to_dict(small_job())))
    done = subprocess.run(
        [sys.executable, "-m", "hybrid", "compare", "job.json", "--strategies", MINE, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["ok"] and result["parity"][MINE]["reference"] == "single"
    run = result["strategies"][MINE]
    assert run["receipt"]["engaged"] and len(run["steps"]) == 6
    assert MINE in (tmp_path / "out" / "compare" / "compare.md").read_text()


def test_the_package_does_not_know_it() -> None:
    assert not [f for f in (ROOT / "hybrid").rglob("*.py") if "toy" in f.read_text()]


def test_what_it_refuses_is_not_possible(tmp_path: Path) -> None:
    result = hybrid.compare(small_job(train__precision="bf16"), [TOY], out=tmp_path)
    assert result.strategies[TOY].status == "not_possible"
    assert "fp32 alone" in str(result.strategies[TOY].reason)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toy", "unknown; valid: single, ddp, .*, package.module"),
        ("tests.no_such_file", "cannot be imported: No module named"),
        ("tests.texts", "the module has no name, no summary, no layout, no build"),
        ("../toy", "unknown; valid: "),
    ],
)
def test_what_is_no_strategy_is_refused(name: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        registry.get(name)
