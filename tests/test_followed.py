"""A bf16 run that follows a reference cut alike and then jumps has a fault; nothing excuses it."""

import dataclasses

import numpy
import pytest

from hybrid.comparison.differences import Run
from hybrid.comparison.followed import FOLLOWS, WEIGHTS_OF_FOLLOWER, judge_follower
from hybrid.comparison.noise import RARE

from .test_parity import STEPS, at_steps, make_run, rule, with_weights

RULE = rule(precision="bf16")


@pytest.mark.parametrize(("quantity", "tolerance"), [("loss", 1e-3), ("grad_norm", 2e-2)])
def test_a_jump_past_the_tolerance_is_a_fault(quantity: str, tolerance: float) -> None:
    jumped = at_steps([30], **{quantity: 1 + 1.01 * tolerance})
    verdict = judge_follower(jumped, make_run(), "single_cut_4", RULE)
    assert verdict and verdict.first_difference and verdict.first_difference.step == 30
    assert verdict.state == "not_equal" and verdict.reference == "single_cut_4"
    small = at_steps([30], **{quantity: 1 + 0.99 * tolerance})
    assert judge_follower(small, make_run(), "single_cut_4", RULE) is None


@pytest.mark.parametrize(("quantity", "tolerance"), [("loss", 1e-3), ("grad_norm", 2e-2)])
def test_what_grows_once_the_run_has_left_is_for_the_controls(
    quantity: str, tolerance: float
) -> None:
    left, after = at_steps([20], **{quantity: 1 + 1.01 * FOLLOWS[quantity]}), at_steps
    later = after([30], **{quantity: 1 + 2 * tolerance}).record.steps[30]
    steps = [*left.record.steps[:30], later, *left.record.steps[31:]]
    assert judge_follower(make_run(steps=steps), make_run(), "single_cut_4", RULE) is None
    still = dataclasses.replace(left.record.steps[20], **{quantity: 1.0})
    following = getattr(make_run().record.steps[20], quantity) * (1 + 0.99 * FOLLOWS[quantity])
    steps[20] = dataclasses.replace(still, **{quantity: following})
    verdict = judge_follower(make_run(steps=steps), make_run(), "single_cut_4", RULE)
    assert verdict and verdict.first_difference and verdict.first_difference.step == 30


def all_off(by: float, names: list[str]) -> Run:
    """A run whose tensors of these names are off by a factor."""
    run = make_run()
    moved = {name: run.weights[name] * numpy.float32(by) for name in names}
    return Run(run.record, {**run.weights, **moved})


def test_final_weights_of_a_run_that_follows_to_the_end_are_held_tighter() -> None:
    names = list(make_run().weights)
    off = all_off(1 + 1.02 * WEIGHTS_OF_FOLLOWER, names)
    verdict = judge_follower(off, make_run(), "single", RULE)
    assert verdict and verdict.first_difference and verdict.first_difference.step is None
    near = all_off(1 + 0.98 * WEIGHTS_OF_FOLLOWER, names)
    assert judge_follower(near, make_run(), "single", RULE) is None
    # A run that left the reference on its way may have moved its weights further.
    steps = at_steps([STEPS - 1], loss=1 + 1e-5).record.steps
    left = dataclasses.replace(off, record=dataclasses.replace(off.record, steps=steps))
    assert judge_follower(left, make_run(), "single", RULE) is None


def test_a_few_weights_of_such_a_run_are_for_the_controls() -> None:
    names = list(make_run().weights)
    few = int(RARE * sum(tensor.size for tensor in make_run().weights.values()))
    for count in (few, few + 1):
        ends = {name: with_weights(name, 1.5).weights[name] for name in names[:count]}
        run = Run(make_run().record, {**make_run().weights, **ends})
        verdict = judge_follower(run, make_run(), "single", RULE)
        assert (verdict is None) == (count == few)
