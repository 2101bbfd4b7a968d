"""A cause is named only where the figures of two runs fit it."""

from __future__ import annotations

import dataclasses

import pytest

from hybrid.comparison.causes import SAME_RATIO, SAME_UPDATE, Facts
from hybrid.comparison.differences import Run
from hybrid.comparison.parity import compare_runs
from hybrid.records import Weights

from .test_parity import (
    FACTORS,
    NAMES,
    START,
    STEPS,
    at_steps,
    first,
    make_run,
    make_weights,
    rule,
    with_weights,
)


@pytest.mark.parametrize(
    ("scale", "cause"),
    [
        (2.0, "2 times too large: not divided by the number of micro-batches"),
        (3.0, "3 times too large: not divided by the number of data-parallel ranks"),
        (1 / 2, "2 times too small: divided twice by the number of micro-batches"),
        (1 / 3, "3 times too small: divided twice by the number of data-parallel ranks"),
        (6.0, "6 times too large: not divided by the number of micro-batches x data-parallel"),
    ],
)
def test_a_scaled_gradient_is_explained(scale: float, cause: str) -> None:
    step, quantity, said = first(at_steps(range(STEPS), grad_norm=scale))
    assert (step, quantity) == (0, "grad_norm")
    assert said is not None and said.startswith(f"gradients {cause}")


def test_a_ratio_that_is_no_factor_is_not_explained() -> None:
    assert first(at_steps(range(STEPS), grad_norm=2.5))[2] is None
    one = {"micro-batches": 1, "data-parallel ranks": 1}
    assert first(at_steps(range(STEPS), grad_norm=2.0), factors=one)[2] is None


def test_a_ratio_counts_as_a_factor_from_both_sides() -> None:
    for by, named in ((1 + 0.9 * SAME_RATIO, True), (1 + 1.1 * SAME_RATIO, False)):
        said = first(at_steps(range(STEPS), grad_norm=2.0 * by))[2]
        assert (said is not None) is named, by


def test_a_scale_is_no_cause_where_the_loss_is_another_from_the_start() -> None:
    """Other dropout masks halve a norm by chance."""
    assert first(at_steps(range(STEPS), loss=1.01, grad_norm=0.5))[2] is None


def test_a_loss_that_is_scaled_as_its_gradients_is_explained() -> None:
    said = first(at_steps(range(STEPS), loss=2.0, grad_norm=2.0))[2]
    assert said == (
        "loss and gradients 2 times too large: not divided by the number of micro-batches"
    )


def test_a_parameter_that_only_one_run_moves_is_named() -> None:
    still = Weights(START, {**make_weights().after_first_step, "1.bias": START["1.bias"]})
    run = with_weights("1.bias", 1.01)
    found = compare_runs(run, Run(make_run(weights=still).record, make_run().weights), "s", rule())
    assert found.first_difference is not None
    said = str(found.first_difference.likely_cause)
    assert said.startswith("1.bias has no first update in the reference, and one here"), said
    found = compare_runs(Run(make_run(weights=still).record, run.weights), make_run(), "s", rule())
    assert found.first_difference is not None
    said = str(found.first_difference.likely_cause)
    assert said.startswith("1.bias has no first update here, and one in the reference"), said


@pytest.mark.parametrize(
    ("clip_norm", "ratio", "why"),
    [
        (0.0, 10.0, "another learning rate"),
        (0.0, 1 / 1.5, "clipped at a norm of 1, as DeepSpeed does"),  # the norm is 1.5
        (0.0, 1 / 1.6, "another learning rate"),
        (1.0, 1.25, "clipped by a norm that is 0.8 of the whole one"),
        (1.0, 0.8, "another learning rate"),
        (2.0, 1.25, "another learning rate"),
    ],
)
def test_updates_that_are_all_off_alike_may_be_clipped(
    clip_norm: float, ratio: float, why: str
) -> None:
    steps = at_steps(range(1, STEPS), loss=1.1).record.steps
    run = make_run(weights=make_weights(dict.fromkeys(NAMES, ratio)), steps=steps)
    facts = Facts(FACTORS, clip_norm=clip_norm)
    found = compare_runs(run, make_run(), "single", dataclasses.replace(rule(), facts=facts))
    assert found.first_difference is not None
    assert f"times the reference's: {why}" in str(found.first_difference.likely_cause)


def test_an_update_counts_as_another_from_both_sides() -> None:
    steps = at_steps(range(1, STEPS), loss=1.1).record.steps
    for by, named in ((1 + 0.9 * SAME_UPDATE, False), (1 + 1.1 * SAME_UPDATE, True)):
        run = make_run(weights=make_weights({"1.bias": by, "2.bias": by}), steps=steps)
        assert ("only 2 tensors (1.bias, 2.bias)" in str(first(run)[2])) is named, by


def test_a_factor_of_one_is_not_named() -> None:
    only = {"micro-batches": 4, "data-parallel ranks": 1}
    said = first(at_steps(range(STEPS), grad_norm=4.0), factors=only)[2]
    assert said == "gradients 4 times too large: not divided by the number of micro-batches"


def test_another_learning_rate_schedule_is_named() -> None:
    got = first(at_steps([5], lr=1.001, loss=1.1))
    assert got == (5, "lr", "another learning-rate schedule")


def test_other_initial_weights_are_named() -> None:
    other = Weights({**START, "2.bias": 7.0}, make_weights().after_first_step)
    run = make_run(weights=other, steps=at_steps(range(STEPS), loss=1.1).record.steps)
    assert first(run) == (0, "initial weights of 2.bias", "other initial weights")
    missing = Weights({n: v for n, v in START.items() if n != "0.bias"}, other.after_first_step)
    assert first(make_run(weights=missing))[1] == "initial weights of 0.bias"


def test_one_stage_with_its_own_rate_is_named() -> None:
    tenfold = make_weights({n: 10.0 for n in NAMES if n[0] in "23"})
    run = make_run(weights=tenfold, steps=at_steps(range(1, STEPS), loss=1.1).record.steps)
    step, quantity, cause = first(run)
    assert (step, quantity) == (1, "loss") and cause is not None
    assert cause.startswith("one stage only: the first update of stage 1 (layers [2, 3]) is 10 tim")


def test_updates_off_everywhere_or_across_stages_are_no_stage() -> None:
    steps = at_steps(range(1, STEPS), loss=1.1).record.steps
    everywhere = make_run(weights=make_weights(dict.fromkeys(NAMES, 10.0)), steps=steps)
    assert "another learning rate" in str(first(everywhere)[2])
    across = make_weights({"1.bias": 10.0, "2.bias": 10.0})
    assert "only 2 tensors (1.bias, 2.bias)" in str(first(make_run(weights=across, steps=steps))[2])


@pytest.mark.parametrize(
    ("norms", "named"),
    [
        ((1.5, 2.2, 2.9, 3.4), True),
        ((1.5, 2.2, 2.1, 3.4), False),  # it does not grow
        ((1.5, 3.1, 3.3, 3.4), False),  # more than two gradients of 1.5
        ((1.6, 2.2, 2.9, 3.4), False),  # the first one is off
    ],
)
def test_gradients_that_add_up_over_steps_are_named(norms: tuple[float, ...], named: bool) -> None:
    steps = list(make_run().record.steps)
    for n, norm in enumerate(norms):
        steps[n] = dataclasses.replace(steps[n], grad_norm=norm)
    said = str(first(make_run(steps=steps))[2])
    assert ("they are not zeroed" in said) is named, said
