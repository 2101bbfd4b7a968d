"""The verdict names the first difference and its cause, and excuses only what rounding explains."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from hybrid import records
from hybrid.comparison.causes import Facts
from hybrid.comparison.differences import (
    SAME_NUMBER,
    SAME_START,
    Run,
    SavedWeights,
    relative,
    weight_differences,
)
from hybrid.comparison.parity import Rule, compare_runs
from hybrid.comparison.tolerances import EXACT_STEPS, TOLERANCES, tolerance
from hybrid.records import EvalResult, Parity, Receipt, Record, StepRecord, Weights

STEPS = 40
FACTORS = {"micro-batches": 2, "data-parallel ranks": 3}
NAMES = [f"{layer}.{kind}" for layer in range(4) for kind in ("weight", "bias")]
START = {name: 1.0 + i for i, name in enumerate(NAMES)}
UPDATES = {name: 0.01 * (1 + i) for i, name in enumerate(NAMES)}
EVAL = EvalResult(0.5, 1000, 900, 0.9, "0a")
CUT = Receipt(
    True, {"layers_by_stage": [[0, 1], [2, 3]], "tensors_by_stage": [NAMES[:4], NAMES[4:]]}
)


def make_weights(scale: dict[str, float] | None = None) -> Weights:
    """Projections, with the first update of some tensors multiplied by `scale`."""
    by = scale or {}
    return Weights(START, {n: START[n] + by.get(n, 1.0) * UPDATES[n] for n in NAMES})


def make_run(**changes: Any) -> Run:
    """A run that agrees with every other one of these, but for `changes` of its record."""
    steps = [StepRecord(n, 2.0 - n / 40, 1.5, 0.1, 24, f"{n:016x}") for n in range(STEPS)]
    record = Record(
        "ddp",
        "ok",
        steps=steps,
        eval=EVAL,
        weights=make_weights(),
        receipt=CUT,
    )
    tensors = {n: numpy.linspace(-1, 1, 5, dtype="float32") for n in NAMES}
    return Run(dataclasses.replace(record, **changes), tensors)


def at_steps(which: range | list[int], **factors: float) -> Run:
    """A run whose quantities are multiplied by `factors` at some steps."""
    steps = list(make_run().record.steps)
    for n in which:
        changed = {key: getattr(steps[n], key) * by for key, by in factors.items()}
        steps[n] = dataclasses.replace(steps[n], **changed)
    return make_run(steps=steps)


def with_weights(name: str, by: float) -> Run:
    """A run whose last element of one final tensor is off by the factor `by`."""
    run = make_run()
    changed = run.weights[name].copy()
    changed[-1] *= by
    return Run(run.record, {**run.weights, name: changed})


def rule(factors: dict[str, int] = FACTORS, precision: str = "fp32", floor: float = 0.0) -> Rule:
    return Rule(tolerance(precision), EXACT_STEPS[precision], floor, Facts(factors))


def verdict(
    run: Run,
    *controls: Run,
    factors: dict[str, int] = FACTORS,
    repeated: tuple[str, ...] = (),
    reference: Run | None = None,
) -> Parity:
    """The verdict with controls that are called c0, c1, ..."""
    named = {f"c{i}": control for i, control in enumerate(controls)}
    expected = reference or make_run()
    return compare_runs(run, expected, "single", rule(factors), named, repeated)


def first(run: Run, *controls: Run, **more: Any) -> tuple[int | None, str, str | None]:
    """Step, quantity and cause of the first difference."""
    found = verdict(run, *controls, **more).first_difference
    assert found is not None, "the run passed"
    return found.step, found.quantity, found.likely_cause


def test_equal_runs_are_equal() -> None:
    result = verdict(make_run())
    assert result.ok and result.first_difference is None and result.excused == []
    assert (result.max_loss_diff, result.max_grad_norm_diff, result.max_weight_diff) == (0, 0, 0)
    assert result.reference == "single" and result.tolerance == TOLERANCES["fp32"]


@pytest.mark.parametrize("quantity", ["loss", "grad_norm"])
def test_a_difference_counts_from_the_tolerance_on(quantity: str) -> None:
    tolerance = TOLERANCES["fp32"][quantity]
    assert verdict(at_steps([3], **{quantity: 1 + 0.9 * tolerance})).ok
    assert first(at_steps([3], **{quantity: 1 + 1.1 * tolerance}))[:2] == (3, quantity)


def test_the_first_of_many_differences_is_named() -> None:
    result = verdict(at_steps(range(3, STEPS), loss=1.01, grad_norm=1.2))
    found = result.first_difference
    assert found is not None and (found.step, found.quantity) == (3, "loss")
    assert found.expected == pytest.approx(2.0 - 3 / 40)
    assert found.got == pytest.approx(1.01 * (2.0 - 3 / 40))
    assert result.max_loss_diff == pytest.approx(0.01)
    assert result.max_grad_norm_diff == pytest.approx(0.2)


def test_other_samples_are_named_before_their_loss() -> None:
    steps = list(make_run().record.steps)
    steps[4] = dataclasses.replace(steps[4], sample_digest="ff", loss=9.0)
    got = first(make_run(steps=steps))
    assert got == (4, "sample_digest", "other samples in the batch")
    steps[2] = dataclasses.replace(steps[2], samples=23)
    assert first(make_run(steps=steps))[:2] == (2, "samples")


def test_a_difference_in_the_evaluation_is_found() -> None:
    one_off = EvalResult(0.5, 1000, 899, 0.899, "0b")
    assert first(make_run(eval=one_off))[:2] == (None, "eval correct")
    assert first(make_run(eval=EvalResult(0.5, 999, 900)))[:2] == (None, "eval samples")
    assert first(make_run(eval=EvalResult(0.6, 1000, 900)))[:2] == (None, "eval loss")
    assert not verdict(make_run(eval=None)).ok, "an absent evaluation passed"


@pytest.mark.parametrize("kept", [0, 39])
def test_missing_steps_are_found(kept: int) -> None:
    short = make_run(steps=make_run().record.steps[:kept])
    found = verdict(short, make_run()).first_difference
    assert found is not None and (found.step, found.quantity) == (kept, "steps")
    assert (found.got, found.expected) == (kept, STEPS)


def test_other_samples_and_rates_are_never_excused() -> None:
    run = at_steps([30], lr=1.01)
    controls = [at_steps([30], lr=1 + by) for by in (0.0, 0.01, 0.02)]
    assert first(run, *controls)[:2] == (30, "lr")
    steps = list(make_run().record.steps)
    steps[30] = dataclasses.replace(steps[30], sample_digest="ff")
    other = make_run(steps=steps)
    assert first(other, other, make_run(), other)[:2] == (30, "sample_digest")


def test_final_weights_are_compared_by_tensor() -> None:
    assert verdict(with_weights("1.weight", 1 + 9e-6)).ok
    assert first(with_weights("1.weight", 1 + 1.1e-5))[:2] == (None, "weights of 1.weight")
    found = verdict(with_weights("1.weight", 1.01))
    assert found.max_weight_diff == pytest.approx(0.01, rel=1e-4)
    assert found.first_difference is not None
    assert found.first_difference.got == pytest.approx(1.01, rel=1e-6)
    assert found.first_difference.expected == pytest.approx(1.0)


def test_a_missing_weight_tensor_is_found_and_never_excused() -> None:
    whole = make_run()
    partial = Run(whole.record, {n: w for n, w in whole.weights.items() if n != "3.bias"})
    spread = [with_weights("3.bias", by) for by in (0.5, 1.5, 2.0)]
    assert first(partial, *spread)[1] == "weights of 3.bias"
    extra = Run(whole.record, {**whole.weights, "4.bias": whole.weights["0.bias"]})
    assert first(extra)[1] == "weights of 4.bias"
    shape = Run(whole.record, {**whole.weights, "0.bias": whole.weights["0.bias"][:3]})
    assert first(shape)[1] == "weights of 0.bias"


def test_weights_that_are_not_numbers_do_not_pass() -> None:
    run = with_weights("1.weight", math.nan)
    spread = [with_weights("1.weight", by) for by in (0.5, 1.5, 2.0)]
    assert first(run, *spread)[1] == "weights of 1.weight"
    assert not verdict(at_steps([3], loss=math.nan)).ok
    assert not verdict(run, run, make_run(), run).ok, "a control of NaN excused NaN"


def test_a_tensor_that_is_rounding_alone_is_compared_with_what_was_moved() -> None:
    """The gradient of an attention's key bias is zero but for rounding."""
    tiny = make_run().weights["1.bias"] * numpy.float32(1e-12)
    with_tiny = {**make_run().weights, "1.bias": tiny}
    other = {**with_tiny, "1.bias": -tiny}
    runs = Run(make_run().record, other), Run(make_run().record, with_tiny)
    for floor, ok in ((0.0, False), (1.9e-7, False), (2.1e-7, True)):
        found = compare_runs(*runs, "single", rule(floor=floor))
        assert found.ok is ok, floor


def test_the_start_counts_from_its_tolerance_on() -> None:
    for by, ok in ((1 + 0.9 * SAME_START, True), (1 + 1.1 * SAME_START, False), (1 + 1e-6, False)):
        moved = Weights({**START, "2.bias": START["2.bias"] * by}, make_weights().after_first_step)
        assert verdict(make_run(weights=moved)).ok is ok, by


def test_a_small_loss_is_compared_on_the_scale_of_the_first_one() -> None:
    """A quarter of 2.0 is 0.5: a loss of 0.1 may differ by 5e-7."""
    small = at_steps([30], loss=0.1 / (2.0 - 30 / 40))
    for by, ok in ((1 + 0.9 * 5e-6, True), (1 + 1.1 * 5e-6, False)):
        run = at_steps([30], loss=by * 0.1 / (2.0 - 30 / 40))
        assert verdict(run, reference=small).ok is ok, by


def test_rates_count_from_their_tolerance_on() -> None:
    assert verdict(at_steps([5], lr=1 + 0.9 * SAME_NUMBER)).ok
    assert not verdict(at_steps([5], lr=1 + 1.2 * SAME_NUMBER)).ok


@pytest.mark.parametrize("precision", list(TOLERANCES))
@pytest.mark.parametrize("quantity", ["loss", "grad_norm", "weights", "eval_loss", "correct"])
def test_each_tolerance_holds_from_both_sides(precision: str, quantity: str) -> None:
    size = tolerance(precision)[quantity]
    for by, ok in ((0.9 * size, True), (1.1 * size + 1e-9, False)):
        if quantity == "weights":
            run = with_weights("1.weight", 1 + by)
        elif quantity == "eval_loss":
            run = make_run(eval=dataclasses.replace(EVAL, loss=EVAL.loss * (1 + by)))  # 0.5
        elif quantity == "correct":
            correct = EVAL.correct - (math.floor if ok else math.ceil)(by * EVAL.samples)
            run = make_run(eval=dataclasses.replace(EVAL, correct=correct))
        else:
            run = at_steps([3], **{quantity: 1 + by})
        found = compare_runs(run, make_run(), "single", rule(precision=precision))
        assert found.ok is ok, (by, found.first_difference)


def test_a_verdict_of_any_outcome_can_be_written() -> None:
    assert json.loads(records.dumps(verdict(make_run())))["ok"] is True
    for run in (with_weights("1.weight", math.nan), Run(make_run().record, {})):
        assert json.loads(records.dumps(verdict(run)))["ok"] is False


def test_relative_differences_by_hand() -> None:
    assert relative(0.0, 0.0) == 0 and relative(1.0, 0.0) == math.inf
    assert relative(3.0, -2.0) == 2.5 and relative(math.nan, 1.0) == math.inf
    near = {"a": numpy.array([2.0, 0.0]), "b": numpy.array([1.0])}
    far = {"a": numpy.array([2.0, 0.5]), "b": numpy.array([1.1])}
    found = [(one.tensor, one.size) for one in weight_differences(far, near)]
    assert found == [("a", pytest.approx(0.25)), ("b", pytest.approx(0.1))]


def test_saved_weights_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    arrays = {name: numpy.full((3, 5), i, "float32") for i, name in enumerate(NAMES)}
    save_file(arrays, tmp_path / "model.safetensors")
    saved = SavedWeights(tmp_path / "model.safetensors")
    assert dict(saved.items()).keys() == arrays.keys() and len(saved) == len(NAMES)
    assert weight_differences(saved, arrays) == [] and "other" not in saved
    (found,) = weight_differences(saved, arrays | {NAMES[2]: arrays[NAMES[2]] + 1})
    assert found.tensor == NAMES[2] and found.elements == 15
    held = weakref.ref(saved[NAMES[0]])
    assert saved[NAMES[0]] is held() and saved[NAMES[1]] is not None
    assert held() is None, "a tensor stays after the next one is read"
