"""An epoch's order: a bijection for every number of samples, as random as its seed and epoch."""

from __future__ import annotations

import math

import numpy
import pytest

from hybrid.data.permutation import permute
from tests.plain_loop import plain_order

LARGEST = 2**63 - 1  # of the seeds


def orders(total: int, number: int, seed: int = 3, first: int = 0) -> numpy.ndarray:
    """The orders of `number` epochs, one a row."""
    rows = [permute(range(total), total, seed, first + i) for i in range(number)]
    return numpy.stack(rows).astype(numpy.int64)


def surprise(counts: numpy.ndarray, freedom: int | None = None) -> float:
    """By how many standard deviations the counts differ more than equally likely ones would."""
    freedom = counts.size - 1 if freedom is None else freedom
    expected = counts.sum() / counts.size
    square = ((counts - expected) ** 2 / expected).sum()
    return float((square - freedom) / math.sqrt(2 * freedom))


def test_every_number_of_samples_has_its_permutations() -> None:
    for total in range(1, 301):
        for seed, epoch in ((0, 0), (LARGEST, total)):
            assert sorted(permute(range(total), total, seed, epoch)) == list(range(total))


@pytest.mark.parametrize("total", [10**7, 10**7 + 19, 2**33, 10**15])
def test_parts_of_a_large_order_have_no_sample_twice(total: int) -> None:
    starts = numpy.random.default_rng(0).integers(total // 20, size=1000) * 20
    ranges = [range(start, start + 20) for start in {0, total - 20, *starts.tolist()}]
    parts = [permute(places, total, 4, 1).tolist() for places in ranges]
    found = {sample for part in parts for sample in part}
    assert len(found) == 20 * len(ranges) and min(found) >= 0 and max(found) < total


@pytest.mark.parametrize("total", [1, 2, 3, 5, 24, 60, 100, 101, 4097])
def test_the_order_is_that_of_the_rule_in_plain_words(total: int) -> None:
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (2**40 + 7, 12), (LARGEST, 10**6)):
        expected = plain_order(total, seed, epoch)
        assert permute(range(total), total, seed, epoch).tolist() == expected
        part = range(total // 3, total // 2)
        assert permute(part, total, seed, epoch).tolist() == expected[total // 3 : total // 2]


@pytest.mark.parametrize("total", [2, 5, 9, 24, 100])
def test_each_position_has_each_sample_equally_often(total: int) -> None:
    found = orders(total, 3000)
    counts = numpy.stack([numpy.bincount(column, minlength=total) for column in found.T])
    assert surprise(counts, (total - 1) ** 2) < 4
    assert max(surprise(row) for row in counts) < 6


@pytest.mark.parametrize("total", [5, 24])
def test_neighbours_are_each_pair_equally_often(total: int) -> None:
    found = orders(total, 3000)
    for i in range(total - 1):
        counts = numpy.bincount(found[:, i] * total + found[:, i + 1], minlength=total**2)
        pairs = counts.reshape(total, total)[~numpy.eye(total, dtype=bool)]
        assert surprise(pairs) < 5


@pytest.mark.parametrize("total", [4000, 10**7])
def test_neighbours_in_a_large_order_are_unrelated(total: int) -> None:
    found = numpy.stack([permute(range(4000), total, 5, i) for i in range(20)]).astype(numpy.int64)
    for lag in (1, 2, math.isqrt(total), math.isqrt(total) + 1):  # a row of the grid, or nearly
        away = (found[:, lag:] - found[:, :-lag]) % total * 16 // total
        assert surprise(numpy.bincount(away.ravel(), minlength=16)) < 5


def test_the_120_orders_of_5_samples_all_come_up() -> None:
    found = orders(5, 6000)
    _, counts = numpy.unique(found @ 5 ** numpy.arange(5), return_counts=True)
    assert len(counts) == 120 and surprise(counts) < 5


@pytest.mark.parametrize("total", [9, 25])  # the squares of odd numbers
def test_half_of_the_orders_are_odd_permutations(total: int) -> None:
    lower = numpy.tril_indices(total, -1)
    inversions = [int((row[:, None] < row)[lower].sum()) for row in orders(total, 1000)]
    assert 420 < sum(number % 2 for number in inversions) < 580


@pytest.mark.parametrize("total", [24, 100])
@pytest.mark.parametrize(
    ("seed", "epoch"),
    [(3, 1), (4, 0), (4, -1), (2, 1), (3 + 2**32, 0), (3 + 2**62, 0), (3, 2**32)],
)
def test_other_seeds_and_epochs_are_unrelated(total: int, seed: int, epoch: int) -> None:
    """Also (seed + 1, epoch) and (seed, epoch + 1)."""
    ours, others = orders(total, 2000, first=1), orders(total, 2000, seed, 1 + epoch)
    counts = numpy.bincount(((others - ours) % total).ravel(), minlength=total)
    assert abs(surprise(counts)) < 5
