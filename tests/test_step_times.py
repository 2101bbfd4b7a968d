"""A run's speed comes from all its steps, and a million of them take no more memory than 8,192."""

from __future__ import annotations

import random
import statistics
import tracemalloc

import pytest

from hybrid.measure.step_times import MOST, StepTimes


def times_of(count: int, ahead: int) -> tuple[StepTimes, list[float], list[float], list[float]]:
    draw = random.Random(count + ahead)
    whole = [1 + draw.random() + (draw.random() < 0.1) * 30 for _ in range(count)]
    own = [draw.random() for _ in range(count)]
    loading = [draw.random() * (i % 7 == 0) for i in range(count)]
    times = StepTimes(ahead)
    for step in zip(whole, own, loading, strict=True):
        times.add(*step)
    return times, whole, own, loading


@pytest.mark.parametrize("ahead", [0, 1, 7, 129])
@pytest.mark.parametrize("count", [1, 3, 500, MOST - 1, MOST, MOST + 1, 3 * MOST + 5])
def test_means_are_exact_and_medians_too_while_all_are_kept(count: int, ahead: int) -> None:
    times, whole, own, loading = times_of(count, ahead)
    found = times.paces()
    assert len(times) == count
    assert found.mean == pytest.approx(statistics.fmean(whole))
    assert found.loading_mean == pytest.approx(statistics.fmean(loading))
    if ahead:
        size = min(ahead, count)
        starts = range(0, count - size + 1, size)
        median = statistics.median(statistics.fmean(whole[i : i + size]) for i in starts)
    else:
        rest = [s - part for s, part in zip(whole, loading, strict=True)]
        median = statistics.median(rest) + statistics.fmean(loading)
    close = 1e-12 if count <= MOST else 0.03  # four standard errors of a sample's median
    assert found.median == pytest.approx(median, abs=close)
    assert found.own_median == pytest.approx(statistics.median(own), abs=close)


def test_all_parts_of_a_long_run_weigh_the_same() -> None:
    times = StepTimes()
    for step in range(21 * MOST):
        times.add(1.0 if step < 11 * MOST else 2.0, 0.5, 0.0)
    assert times.paces().median == 1.0
    for _ in range(2 * MOST):
        times.add(2.0, 0.5, 0.0)
    assert times.paces().median == 2.0 and len(times) == 23 * MOST


def test_a_million_steps_take_no_more_memory() -> None:
    times = StepTimes()
    tracemalloc.start()
    try:
        for _ in range(1_000_000):
            times.add(1.5, 1.0, 0.25)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2**20 and times.paces().mean == 1.5
