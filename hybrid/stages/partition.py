"""This module decides which layers each pipeline stage holds. It is pure Python."""

import itertools
from collections.abc import Collection, Iterable, Sequence

from ..job.errors import JobError
from ..job.strategy_settings import Partition
from ..layout import (
    LayoutError,
    make_ranges,
    partition_by_weight,
    partition_explicit,
    partition_uniform,
)


def partition(method: Partition, layer_parameters: Sequence[int], stages: int) -> list[range]:
    """Return the layers of each stage by `strategy.pipeline.partition`.

    Raises JobError where a list does not fit the layers or stages."""
    if isinstance(method, list):
        try:
            return partition_explicit(method, len(layer_parameters), stages)
        except LayoutError as error:
            raise JobError(str(error)) from None
    if method == "parameters" and len(layer_parameters) >= stages:
        return partition_by_weight(layer_parameters, stages)
    # A layer without parameters, such as an activation, goes with the layer before it: a stage of
    # such layers alone would have nothing to train.
    trained = [i for i, size in enumerate(layer_parameters) if size]
    if len(trained) < stages:
        return partition_uniform(len(layer_parameters), stages)
    groups = partition_uniform(len(trained), stages)
    starts = [0, *(trained[group.start] for group in groups[1:]), len(layer_parameters)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def cut_groups(sizes: Sequence[int], barred: Collection[int]) -> list[int]:
    """Return the numbers of layers in the smallest runs that can each be a stage.

    Each run has parameters, and none ends with a barred layer."""
    groups, length, weight = [], 0, 0
    for i, size in enumerate(sizes):
        length, weight = length + 1, weight + size
        if weight and i not in barred and sum(sizes[i + 1 :]):
            groups.append(length)
            length = weight = 0
    return [*groups, length]


def best_cut(sizes: Sequence[int], stages: int, barred: Collection[int]) -> list[int] | None:
    """Return the numbers of layers so that the heaviest stage is as light as possible.

    It cuts between `cut_groups`; returns None where there are too few of these."""
    groups = cut_groups(sizes, barred)
    if len(groups) < stages:
        return None
    weights = weigh(sizes, make_ranges(groups))
    return weigh(groups, partition_by_weight(weights, stages))


def weigh(sizes: Sequence[int], parts: Iterable[range]) -> list[int]:
    """Sum the sizes of each part's layers."""
    return [sum(sizes[i] for i in part) for part in parts]
