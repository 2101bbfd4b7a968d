"""Ranks that take different branches are named, with the parameters that each of them used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hybrid
from hybrid.job.errors import Failure
from hybrid.training import branches
from hybrid.training.branches import describe, explain, find_branches
from tests.conftest import small_job
from tests.test_users_line import own_job

PAIR = r"rank 0: 1\.([ab])\.bias, 1\.\1\.weight; rank 1: 1\.([ab])\.bias, 1\.\2\.weight"
CHANGES = {"train__global_batch": 12, "train__micro_batches": 2}


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3"])
def test_the_ranks_and_their_parameters_are_named(strategy: str) -> None:
    found = find_branches(own_job("branch", **CHANGES), strategy, 2)
    match = re.fullmatch(rf"ranks used .* in step \d, micro-batch \d: {PAIR}", found)
    assert match and match[1] != match[2], found


def test_four_ranks_are_grouped_by_what_they_used() -> None:
    found = find_branches(own_job("branch", **CHANGES), "zero2", 4)
    groups = re.findall(r"ranks? ([\d, ]+): (1\.[ab]\.bias)", found)
    assert len(groups) == 2 and groups[0][1] != groups[1][1], found
    assert sorted(",".join(g[0] for g in groups).replace(" ", "").split(",")) == list("0123")


def test_a_branch_after_the_step_that_failed_is_no_cause() -> None:
    """Nor do the micro-batches of one rank count, but for DDP, which waits in the last one."""
    job = own_job("branch", train__global_batch=16, train__micro_batches=8)
    found = find_branches(job, "ddp", 2, last=0)
    assert found.startswith(("ranks used", "the micro-batches of rank ")) and "in step 0" in found
    assert find_branches(job, "ddp", 2, last=-1) == ""


def test_a_model_without_branches_has_none() -> None:
    assert find_branches(own_job(), "ddp", 2) == ""


def test_what_is_described() -> None:
    used = [frozenset("abcdef"), frozenset("a"), frozenset("abcdef")]
    said = describe("micro-batch", used)
    assert said == "micro-batches 0, 2: b, c, d, e and 1 more; micro-batch 1: none of these"


@pytest.mark.parametrize(
    ("message", "kind", "nproc"),
    [
        ("RuntimeError: planted (in step 2)", "error", 2),
        ("collective mismatch", "error", 1),
        ("collective mismatch", "job", 2),
    ],
)
def test_other_failures_start_nothing(
    message: str, kind: str, nproc: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches, "run_ranks", None)
    failure = Failure(1, message, "", kind)  # type: ignore[arg-type]
    assert explain(failure, small_job(), "ddp", nproc, tmp_path) is failure


def test_a_model_that_finds_no_memory_leaves_the_failure_as_it_is(tmp_path: Path) -> None:
    failure = Failure(1, "was ended by SIGABRT: collective mismatch (in step 1)", "")
    job = small_job(model={"name": "tests.test_branches:too_large"})
    assert explain(failure, job, "ddp", 2, tmp_path) == failure


def too_large() -> None:
    raise MemoryError


@pytest.mark.usefixtures("without_tryout")
def test_a_run_that_fails_so_says_it_first(tmp_path: Path) -> None:
    limits = {"start_timeout_s": 60, "collective_timeout_s": 5}
    job = own_job("branch", **CHANGES, launch=limits)
    result = hybrid.compare(job, ["zero1"], nproc=2, out=tmp_path)
    reason = str(result.strategies["zero1"].reason)
    said = rf"rank [01] on \S+: ranks used .*{PAIR}; so their collectives did not match: "
    assert re.match(said, reason), reason
    assert "ranks used different parameters in step" in (tmp_path / "compare.md").read_text()
