"""Controls excuse what rounding explains, by their spread among themselves, and nothing else."""

from __future__ import annotations

import numpy
import pytest

from hybrid.comparison.differences import Run
from hybrid.comparison.noise import KINK, LENIENT, SHARE_OF_NOISE
from hybrid.comparison.parity import compare_runs
from hybrid.comparison.tolerances import EXACT_STEPS

from .test_parity import at_steps, first, make_run, rule, verdict, with_weights

RIGHT = make_run()
ALL = ("c0", "c1", "c2")


def spread(step: int, quantity: str, size: float) -> list[Run]:
    """Three controls that are `size` apart from one another, or twice that, from a step on."""
    return [at_steps(range(step, 40), **{quantity: 1 + i * size}) for i in range(3)]


@pytest.mark.parametrize("quantity", ["loss", "grad_norm"])
def test_a_late_difference_needs_controls_that_spread(quantity: str) -> None:
    run = at_steps([30], **{quantity: 1.01})
    assert first(run)[:2] == (30, quantity)
    assert first(run, RIGHT, RIGHT, RIGHT)[:2] == (30, quantity)
    assert first(run, *spread(30, quantity, 0.49 * SHARE_OF_NOISE * 0.01))[:2] == (30, quantity)
    assert first(run, *spread(31, quantity, 1.0))[:2] == (30, quantity)
    result = verdict(run, *spread(30, quantity, 1.02 * SHARE_OF_NOISE * 0.01))
    assert result.ok and result.state == "equal" and len(result.excused) == 1
    excused = result.excused[0]
    assert (excused["step"], excused["quantity"]) == (30, quantity)
    assert excused["difference"] == pytest.approx(0.01)
    assert excused["control"] == pytest.approx(2.04 * SHARE_OF_NOISE * 0.01)


def test_controls_that_meet_by_chance_excuse_what_they_did_before() -> None:
    """Noise does not shrink: two runs that were apart can meet at one step."""
    apart = [at_steps([25, 26, 27], loss=by) for by in (0.99, 1.01)]
    assert verdict(at_steps([30], loss=1.01), RIGHT, *apart).ok


def test_an_early_difference_is_never_excused() -> None:
    for precision, exact in EXACT_STEPS.items():
        for step, ok in ((exact - 1, False), (exact, True)):
            off = at_steps([step], loss=1.1)
            controls = dict(zip("abc", spread(exact, "loss", 0.1), strict=True))
            found = compare_runs(off, RIGHT, "single", rule(precision=precision), controls)
            assert found.ok is ok, (precision, step)


def test_a_reference_that_goes_wrong_is_named() -> None:
    """The controls are right, and so is the run."""
    wrong = at_steps(range(30, 40), loss=1.001)
    found = verdict(RIGHT, RIGHT, RIGHT, RIGHT, reference=wrong)
    assert found.first_difference is not None and not found.excused
    assert found.first_difference.step == 30
    assert str(found.first_difference.likely_cause).startswith("single itself is off there")


def test_a_run_that_goes_wrong_is_not_blamed_on_the_reference() -> None:
    assert first(at_steps(range(30, 40), loss=1.001), RIGHT, RIGHT, RIGHT)[2] is None


def test_a_control_that_leaves_the_reference_in_the_exact_steps_excuses_nothing() -> None:
    wrong, off = at_steps(range(30, 40), loss=1.001), at_steps(range(40), loss=1.001)
    found = verdict(wrong, off, RIGHT, RIGHT)
    assert not found.ok and found.refused == ["c0"]
    assert not verdict(wrong, off, off, RIGHT, RIGHT).ok
    assert verdict(wrong, *spread(20, "loss", 0.001)).refused == []
    for by, refused in ((0.9, []), (1.1, ["c0"])):
        near = at_steps(range(40), loss=1 + by * LENIENT * 1e-6)
        assert verdict(wrong, near, RIGHT, RIGHT).refused == refused, by
    assert verdict(wrong, *spread(19, "loss", 0.001)).refused == ["c1", "c2"]


def test_the_word_of_one_control_counts_once_it_is_repeated() -> None:
    wrong = at_steps(range(30, 40), loss=1.001)
    assert not verdict(wrong, wrong, RIGHT, RIGHT).ok
    assert not verdict(wrong, wrong, RIGHT, RIGHT, repeated=("c1", "c2")).ok
    assert verdict(wrong, wrong, RIGHT, RIGHT, repeated=("c0",)).ok


def test_a_kink_is_called_one() -> None:
    def jumps(by: float) -> bool:
        step = [at_steps([29], loss=1 + 0.01 / by), at_steps(range(30, 40), loss=1.01)]
        both = [RIGHT, *step]
        found = verdict(at_steps(range(30, 40), loss=1.01), *both, repeated=ALL)
        assert found.ok
        return "kink" in found.excused[0]

    assert jumps(1.1 * KINK) and not jumps(0.9 * KINK)


def test_a_real_difference_after_an_excused_one_is_named() -> None:
    controls = spread(30, "loss", 0.01)
    assert verdict(at_steps([30, 35], loss=1.01), *controls).ok
    late = at_steps([30], loss=1.01)
    late = make_run(steps=[*late.record.steps[:35], *at_steps([35], loss=1.2).record.steps[35:]])
    result = verdict(late, *controls)
    assert [e["step"] for e in result.excused] == [30]
    assert result.first_difference is not None and result.first_difference.step == 35


def test_weights_are_excused_tensor_by_tensor_in_a_run_of_any_length() -> None:
    short = RIGHT.record.steps[:5]

    def of(name: str, by: float) -> Run:
        run = with_weights(name, by)
        return Run(make_run(steps=short).record, run.weights)

    reference, run = of("1.weight", 1.0), of("1.weight", 1.01)
    assert not verdict(run, reference=reference).ok
    other = [of("0.bias", by) for by in (1.0, 1.01, 1.02)]
    assert not verdict(run, *other, reference=reference).ok, "another tensor's noise"
    for by, ok in ((0.98, False), (1.02, True)):
        far = of("1.weight", 1 + by * SHARE_OF_NOISE * 0.01)
        found = verdict(run, reference, far, far, reference=reference, repeated=ALL)
        assert found.ok is ok, by
    assert found.excused[0]["quantity"] == "weights of 1.weight"
    assert found.excused[0]["tensors"] == 1
    wrong = Run(run.record, {**run.weights, "2.bias": run.weights["2.bias"] * 1.001})
    found = verdict(wrong, reference, far, far, reference=reference, repeated=ALL)
    assert found.first_difference is not None
    assert found.first_difference.quantity == "weights of 2.bias"


def test_an_evaluation_is_excused_by_its_own_noise() -> None:
    def of(loss: float, correct: int) -> Run:
        from .test_parity import EVAL, dataclasses

        return make_run(eval=dataclasses.replace(EVAL, loss=loss, correct=correct))

    run = of(0.51, 890)
    assert first(run)[1] == "eval loss"
    assert first(run, RIGHT, of(0.51, 900), of(0.49, 900))[1] == "eval correct"
    assert verdict(run, RIGHT, of(0.51, 890), of(0.49, 910)).ok


def test_a_spread_of_tensors_is_the_greatest_of_any_two() -> None:
    from hybrid.comparison.noise import _spread

    three = [numpy.array([0.0, 1.0]), numpy.array([0.5, 1.0]), numpy.array([0.2, 3.0])]
    assert _spread(three, 4.0) == 0.5 and _spread(three[:1], 4.0) == 0.0
    assert _spread([1.0, float("nan")], 1.0) == 0.0


def few_weights(count: int, by: float) -> Run:
    """A run that is off in so many weights of a large tensor."""
    tensor = numpy.ones(100, dtype="float32")
    tensor[:count] += by
    return Run(RIGHT.record, {**RIGHT.weights, "large": tensor})


def test_a_few_weights_that_fell_to_the_other_side_are_excused() -> None:
    """All controls agree there; elsewhere a few of them are as far apart."""
    reference, run = few_weights(0, 0.0), few_weights(1, 0.01)
    agreed = [few_weights(0, 0.0) for _ in range(3)]
    assert not verdict(run, *agreed, reference=reference).ok
    controls = [few_weights(0, 0.0), *(with_large("0.bias", by) for by in (1.01, 0.99))]
    assert verdict(run, *controls, reference=reference, repeated=ALL).ok
    assert not verdict(few_weights(40, 0.01), *controls, reference=reference, repeated=ALL).ok
    assert not verdict(few_weights(1, 0.2), *controls, reference=reference, repeated=ALL).ok


def with_large(name: str, by: float) -> Run:
    run = with_weights(name, by)
    return Run(run.record, {**run.weights, "large": few_weights(0, 0.0).weights["large"]})


def test_one_weight_of_a_small_tensor_is_excused_where_many_are_apart_elsewhere() -> None:
    def of(large: int, small: int) -> Run:
        tensor = numpy.ones(8, dtype="float32")
        tensor[:small] += 0.01
        return Run(RIGHT.record, {**few_weights(large, 0.01).weights, "small": tensor})

    for noisy, off, ok in ((60, 1, True), (60, 2, False), (1, 1, False)):
        controls = [of(0, 0), of(noisy, 0), of(noisy, 0)]
        found = verdict(of(0, off), *controls, reference=of(0, 0), repeated=ALL)
        assert found.ok is ok, (noisy, off)
