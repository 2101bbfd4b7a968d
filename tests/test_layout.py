"""Degrees of parallelism, coordinates of ranks, shares of a batch, stages of a pipeline."""

from __future__ import annotations

import itertools
import random

import pytest

from hybrid.layout import (
    Layout,
    LayoutError,
    fill_degrees,
    micro_batch_size,
    partition_by_weight,
    partition_explicit,
    partition_uniform,
    split,
    split_sizes,
)


@pytest.mark.parametrize("total", range(14))
@pytest.mark.parametrize("parts", range(1, 8))
def test_sizes_add_up_and_differ_by_one_at_most(total: int, parts: int) -> None:
    sizes = split_sizes(total, parts)
    assert len(sizes) == parts and sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True), "larger ones first"
    items = list(range(100, 100 + total))
    pieces = split(items, parts)
    assert [len(piece) for piece in pieces] == sizes
    assert list(itertools.chain(*pieces)) == items, "every item once, in order"


def test_sizes_of_known_splits() -> None:
    assert split_sizes(100, 3) == [34, 33, 33]
    assert split_sizes(2, 4) == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("batch", "dp", "pieces", "size"),
    [(100, 1, 4, 25), (100, 3, 4, 9), (100, 4, 1, 25), (10, 4, 3, 1), (2, 3, 4, 1), (7, 2, 2, 2)],
)
def test_micro_batch_size_is_that_of_the_largest(
    batch: int, dp: int, pieces: int, size: int
) -> None:
    assert micro_batch_size(batch, dp, pieces) == size
    shares = split_sizes(batch, dp)
    assert size == max(n for share in shares for n in split_sizes(share, pieces))


@pytest.mark.parametrize(("pp", "dp"), [(1, 1), (3, 1), (1, 4), (2, 2), (2, 3), (4, 2)])
def test_every_rank_has_coordinates_of_its_own(pp: int, dp: int) -> None:
    layout = Layout(pp=pp, dp=dp, replicate=dp)
    assert layout.world_size == pp * dp
    places = [(layout.stage(r), layout.dp_rank(r)) for r in range(layout.world_size)]
    assert sorted(places) == list(itertools.product(range(pp), range(dp)))
    assert [stage * dp + column for stage, column in places] == list(range(pp * dp))


def test_columns_of_a_stage_are_neighbours() -> None:
    layout = Layout(pp=2, dp=3, replicate=1, shard=3)
    assert [layout.stage(r) for r in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [layout.dp_rank(r) for r in range(6)] == [0, 1, 2, 0, 1, 2]
    assert layout.to_dict() == {"pp": 2, "dp": 3, "replicate": 1, "shard": 3}


@pytest.mark.parametrize(("replicate", "shard"), [(1, 1), (2, 1), (2, 4), (3, 2), (8, 1)])
def test_replicate_times_shard_must_be_dp(replicate: int, shard: int) -> None:
    with pytest.raises(LayoutError, match=f"replicate {replicate} x shard {shard} is not dp = 4"):
        Layout(dp=4, replicate=replicate, shard=shard)


@pytest.mark.parametrize("axis", ["pp", "dp", "replicate", "shard"])
@pytest.mark.parametrize("degree", [0, -2])
def test_a_degree_is_at_least_one(axis: str, degree: int) -> None:
    with pytest.raises(LayoutError, match=f"{axis} = {degree}: a degree is at least 1"):
        Layout(**{axis: degree})


@pytest.mark.parametrize(
    ("nproc", "given", "filled"),
    [
        (4, (None, None), (1, 4)),
        (4, (2, None), (2, 2)),
        (4, (None, 2), (2, 2)),
        (6, (2, 3), (2, 3)),
        (4, (4, None), (4, 1)),
        (1, (1, 1), (1, 1)),
    ],
)
def test_the_degree_left_out_follows(
    nproc: int, given: tuple[int | None, int | None], filled: tuple[int, int]
) -> None:
    assert fill_degrees(nproc, *given, "a x b") == filled


@pytest.mark.parametrize("given", [(3, None), (None, 3), (2, 3), (5, None), (None, 5), (5, 5)])
def test_degrees_that_do_not_multiply_are_named(given: tuple[int | None, int | None]) -> None:
    with pytest.raises(LayoutError, match=r"a x b: .* is not 4 processes") as error:
        fill_degrees(4, *given, "a x b")
    assert all(str(degree) in str(error.value) for degree in given if degree)
    assert " 0 " not in str(error.value), "nobody asked for a degree of 0"


# Partitions


def assert_is_a_cut(parts: list[range], layers: int, stages: int) -> None:
    assert len(parts) == stages
    assert [i for part in parts for i in part] == list(range(layers))


@pytest.mark.parametrize(
    ("layers", "stages", "sizes"),
    [(4, 2, [2, 2]), (4, 3, [2, 1, 1]), (5, 2, [3, 2]), (3, 3, [1] * 3)],
)
def test_uniform_partition_evens_out_numbers_of_layers(
    layers: int, stages: int, sizes: list[int]
) -> None:
    parts = partition_uniform(layers, stages)
    assert_is_a_cut(parts, layers, stages)
    assert [len(part) for part in parts] == sizes


def lightest_by_brute_force(weights: list[int], stages: int) -> int:
    """The heaviest stage of the best of all cuts."""
    layers = len(weights)
    cuts = itertools.combinations(range(1, layers), stages - 1)
    edges = [(0, *cut, layers) for cut in cuts]
    return min(max(sum(weights[a:b]) for a, b in itertools.pairwise(e)) for e in edges)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(12))
def test_partition_by_weight_is_the_best_there_is(stages: int, seed: int) -> None:
    draw = random.Random(seed)
    weights = [draw.choice([0, 1, 5, 40, 401408]) for _ in range(draw.randint(stages, 8))]
    parts = partition_by_weight(weights, stages)
    assert_is_a_cut(parts, len(weights), stages)
    assert all(parts), "no stage is empty"
    heaviest = max(sum(weights[i] for i in part) for part in parts)
    assert heaviest == lightest_by_brute_force(weights, stages)


def test_partition_by_weight_of_the_mnist_model() -> None:
    weights = [784 * 512 + 512, 512 * 256 + 256, 256 * 128 + 128, 128 * 10 + 10]
    assert partition_by_weight(weights, 2) == [range(0, 1), range(1, 4)]
    assert partition_uniform(4, 2) == [range(0, 2), range(2, 4)]


def test_explicit_partition_is_taken_as_it_is() -> None:
    assert partition_explicit([1, 3], 4, 2) == [range(0, 1), range(1, 4)]


@pytest.mark.parametrize("sizes", [[4], [1, 2], [2, 2, 2], [1, 1, 2], [3, 3]])
def test_explicit_partition_that_does_not_fit_says_both_counts(sizes: list[int]) -> None:
    with pytest.raises(LayoutError) as error:
        partition_explicit(sizes, 4, 2)
    assert f"names {len(sizes)} stages and {sum(sizes)} layers" in str(error.value)
    assert "the run has 2 stages and 4 layers" in str(error.value)
