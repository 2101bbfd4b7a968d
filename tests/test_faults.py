"""Planted faults, each caught and named: a comparison that cannot fail proves nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import hybrid
from tests.conftest import ROOT, small_job


def compare_with(fault: str, strategy: str, out: Path, nproc: int = 2, **changes: Any) -> Any:
    """A comparison of one strategy whose ranks carry the fault; `by_torch` is `pipeline` so."""
    program = [sys.executable, str(ROOT / "tests" / "faulty.py"), fault]
    job = small_job(variant={"by_torch": {"strategy": "pipeline", "engine": "torch"}}, **changes)
    return hybrid.compare(job, [strategy], nproc=nproc, out=out, program=program)


@pytest.mark.parametrize(
    ("fault", "strategy", "cause"),
    [
        ("not_divided_by_accumulation", "ddp", "2 times too large: not divided by the number of"),
        ("stage_not_divided_by_accumulation", "pipeline", "micro-batches"),
        ("samples_of_another_step", "zero1", "other samples"),
        ("stage_with_larger_updates", "pipeline", "one stage only: the first update of stage 1"),
        ("stage_with_larger_updates", "by_torch", "one stage only: the first update of stage 1"),
        ("other_initial_weight", "fsdp", "other initial weights"),
    ],
)
def test_parity_catches_and_names(fault: str, strategy: str, cause: str, tmp_path: Path) -> None:
    result = compare_with(fault, strategy, tmp_path, train__micro_batches=2)
    assert not result.ok
    verdict = result.parity[strategy]
    assert not verdict.ok
    first = verdict.first_difference
    assert first is not None and first.step in (0, 1), first
    assert first.likely_cause and cause in first.likely_cause, first


@pytest.mark.parametrize(
    ("fault", "strategy", "reason"),
    [
        ("same_samples_on_two_ranks", "ddp", "trained on the same samples"),
        ("rank_skips_all_reduce", "ddp", "rank 1 has gradient norm"),
        ("stage_with_another_rate", "pipeline", "rank 1 has learning rate"),
        ("targets_of_another_batch", "pipeline", "are of different samples"),
        ("fsdp_falls_back", "fsdp", "every parameter is a DTensor"),
    ],
)
def test_the_run_itself_refuses(fault: str, strategy: str, reason: str, tmp_path: Path) -> None:
    result = compare_with(fault, strategy, tmp_path)
    assert not result.ok and not result.parity[strategy].ok
    record = result.strategies[strategy]
    assert record.status == "failed"
    assert record.reason and reason in record.reason, record.reason
