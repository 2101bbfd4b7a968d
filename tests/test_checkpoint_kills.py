"""A few cases of the campaign of kills (benchmarks/checkpoint_kills.py), and that it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill_cases import (
    INSTANTS,
    PHASES,
    Reference,
    at_end,
    cells,
    draw_instant,
    draw_phase,
    run_case,
)
from hybrid.launch.warm import warm_ranks
from hybrid.strategies.registry import NAMES


def test_cases_cover_what_they_are_drawn_from() -> None:
    names = ["single", "ddp", "fsdp"]
    cases = [draw_phase(number, names) for number in range(96)]
    there = {(c.strategy, c.accident.rank, c.kind) for c in cases}
    assert there == set(cells(names)) and len(there) == 9 * len(PHASES)
    assert {draw_phase(number, list(NAMES)).strategy for number in range(96)} == set(NAMES)
    instants = [draw_instant(number, names) for number in range(200)]
    assert {case.kind for case in instants} == set(INSTANTS)
    drawn = {(case.accident.call, case.accident.after) for case in instants}
    assert {("rename", True), ("rename", False), ("unlink", True), ("fdatasync", False)} <= drawn
    assert instants == [draw_instant(number, names) for number in range(200)]


@pytest.mark.campaign
def test_a_few_cases_are_exact_and_a_wrong_end_is_found(tmp_path: Path) -> None:
    with warm_ranks():
        reference = Reference("single", tmp_path / "references")
        cases = [draw_instant(number, ["single"]) for number in (0, 1, 7)]
        rows = [run_case(case, reference, tmp_path / "run") for case in cases]
    assert [row["problems"] for row in rows] == [[], [], []]
    assert all(row["reached"] for row in rows), rows
    (tmp_path / "run" / "left.part").touch()
    reference.hashes[12] = reference.weights = "another"
    found = at_end(tmp_path / "run", reference, reference.record)
    assert found == ["other final weights", "left.part was left"]
