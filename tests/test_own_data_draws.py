"""Samples of a user's own that draw random numbers are the same for any cut of the batches."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch

from hybrid.data.batches import BatchPlan
from hybrid.data.loader import load_micro_batch
from hybrid.data.samples import job_sets
from hybrid.data.seeds import generator_states, same_states
from hybrid.data.steps import StepLoader
from tests import own_data
from tests.own_data import Own, Together, augmented, noise
from tests.own_samples import NAME, X, sets


def steps_of(samples: Any, plan: BatchPlan, steps: range, size: int | None = None) -> list[Any]:
    """Each step's samples as {(step, sample): (input, target)}, over all shares."""
    loader = StepLoader(plan, samples, range(plan.shares), size)
    found: dict[Any, Any] = {}
    for step in steps:
        for batch in loader.step(step):
            for i, row, target in zip(batch.ids.tolist(), batch.input, batch.target, strict=False):
                found[step, i] = (row.tolist(), target.tolist())
    return sorted(found.items())


@pytest.mark.parametrize("together", [False, True])
def test_random_samples_are_the_same_for_any_cut_of_the_batches(together: bool) -> None:
    train, test = job_sets(NAME, 5, *own_data.augmented_sets(together), None)
    plans = [BatchPlan(50, 12, shares, cuts, 3) for shares, cuts in ((1, 1), (4, 2), (3, 5))]
    runs = [steps_of(train, plan, range(8), size) for plan in plans for size in (None, 12)]
    assert all(run == runs[0] for run in runs) and len(runs[0]) == 12 * 4 + 2 + 12 * 3
    by_epoch = {i: value for (step, i), value in runs[0] if step < 5}
    again = {i: value for (step, i), value in runs[0] if step >= 5}
    assert all(again[i] != by_epoch[i] for i in again), "each epoch draws other numbers"
    evaluated = [steps_of(test, BatchPlan(11, 4, n, 2, None), range(3)) for n in (1, 3)]
    assert evaluated[0] == evaluated[1]
    other = job_sets(NAME, 6, *own_data.augmented_sets(together), None)[0]
    assert steps_of(other, plans[0], range(1)) != steps_of(train, plans[0], range(1))


def test_a_test_set_draws_other_numbers_than_a_train_set() -> None:
    train, test = sets(Own(7, augmented))
    assert train[3][0].tolist() != test[3][0].tolist()
    assert train[3][0].tolist() == train[3][0].tolist()


def test_reading_leaves_the_generators_as_they_were() -> None:
    for samples in sets(Own(7, augmented)) + sets(Together(7, augmented)):
        before = generator_states()
        load_micro_batch(samples, [3, 1], 4)
        assert same_states(before, generator_states())
        assert samples[1] is not None and same_states(before, generator_states())
    for draw in (lambda: torch.rand(()), lambda: numpy.random.rand(), random.random, noise):
        before = generator_states()
        draw(*([1] if draw is noise else []))
        assert not same_states(before, generator_states()), "each generator is looked at"


def test_a_set_that_reads_together_is_asked_once_unless_it_draws() -> None:
    asked: list[list[int]] = []

    class Counting(Together):
        def __getitems__(self, ids: list[int]) -> list[Any]:
            asked.append(ids)
            return super().__getitems__(ids)

    load_micro_batch(sets(Counting(7, lambda i: (X, i)))[0], [3, 1], 4)
    assert asked == [[3, 1, 0]]
    asked.clear()
    drawing = sets(Counting(7, augmented))[0]
    load_micro_batch(drawing, [3, 1])
    load_micro_batch(drawing, [2, 4])
    assert asked == [[3, 1], [3], [1], [2], [4]]
