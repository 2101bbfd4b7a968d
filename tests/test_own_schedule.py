"""Schedules by import path: the factor of each step, and what is refused before a run."""

from __future__ import annotations

from typing import Any

import pytest

import hybrid
from hybrid.engines.schedule import check_schedule, learning_rate
from hybrid.job.errors import JobError
from tests.conftest import small_job


def job(name: str, steps: int = 5, **options: Any) -> hybrid.Job:
    """The small job, with a rate of 0.5."""
    return small_job(
        optimizer__lr=0.5,
        schedule={"name": f"tests.optimizers:{name}", "options": options},
        train__steps=steps,
    )


def test_the_rate_is_multiplied_by_what_the_function_gives() -> None:
    rates = [learning_rate(job("halves"), step) for step in range(3)]
    assert rates == [0.5, 0.25, 0.125]
    rates = [learning_rate(job("noam", warmup=2), step) for step in range(5)]
    assert rates == pytest.approx([0.25, 0.4, 0.3, 0.2, 0.1])
    check_schedule(job("noam", warmup=2))


def test_a_run_has_these_rates_live() -> None:
    record = hybrid.train(job("noam", 4, warmup=1), "single")
    assert [step.lr for step in record.steps] == pytest.approx([0.5, 0.375, 0.25, 0.125])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("turns_negative", {}, "step 3: gave -1.0; valid: a factor of optimizer.lr"),
        ("no_number", {}, "step 0: gave 'fast'"),
        ("noam", {}, "step 0: TypeError: noam() missing 1 required positional argument: 'warmup'"),
        ("noam", {"warmup": 0}, "step 0: ZeroDivisionError"),
        ("halves", {"by": 3}, "unexpected keyword argument 'by'"),
        ("other_each_time", {}, "another factor for step 0 when it is called again"),
        ("nothing", {}, "has no attribute 'nothing'"),
    ],
)
def test_what_gives_no_rate_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as refused:
        check_schedule(job(name, **options))
    said = str(refused.value)
    assert words in said and said.startswith(f"schedule.name = 'tests.optimizers:{name}': ")
    assert len(said.splitlines()) == 1


def test_a_rate_that_no_step_of_the_run_has_is_no_problem() -> None:
    check_schedule(job("turns_negative", steps=3))


def test_the_length_must_be_known_where_the_function_takes_it() -> None:
    endless = small_job(
        schedule={"name": "tests.optimizers:noam", "options": {"warmup": 1}},
        train={"global_batch": 24, "epochs": 1},
    )
    with pytest.raises(ValueError, match="resolve_lengths"):
        learning_rate(endless, 0)
