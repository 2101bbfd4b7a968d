"""A strategy from outside the package is taken by its module's name."""

from __future__ import annotations

from pathlib import Path

import pytest

import hybrid
from hybrid.config import JobError
from hybrid.strategies import registry
from tests.conftest import small_job

TOY = "tests.toy_strategy"


def test_a_toy_from_outside_is_run_and_judged_like_any_other(tmp_path: Path) -> None:
    result = hybrid.compare(small_job(), [TOY], out=tmp_path)
    assert result.ok and result.parity[TOY].reference == "single"
    run = result.strategies[TOY]
    assert run.receipt and run.receipt.engaged and len(run.steps) == 6
    assert TOY in (tmp_path / "compare.md").read_text()


def test_what_it_refuses_is_not_possible(tmp_path: Path) -> None:
    result = hybrid.compare(small_job(train__precision="bf16"), [TOY], out=tmp_path)
    assert result.strategies[TOY].status == "not_possible"
    assert "fp32 alone" in str(result.strategies[TOY].reason)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toy", "unknown; valid: single, ddp, .*, package.module"),
        ("tests.no_such_file", "cannot be imported: No module named"),
        ("tests.texts", "the module has no name, no summary, no layout, no check, no period, no b"),
        ("../toy", "unknown; valid: "),
    ],
)
def test_what_is_no_strategy_is_refused(name: str, words: str) -> None:
    with pytest.raises(JobError, match=words):
        registry.get(name)
