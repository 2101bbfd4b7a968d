"""Which layers each pipeline stage holds, and what about it cannot be run. Pure Python."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..job.errors import JobError
from ..job.schema import Partition
from ..layout import LayoutError, partition_by_weight, partition_explicit, partition_uniform


def partition(method: Partition, layer_parameters: Sequence[int], stages: int) -> list[range]:
    """Layers of each stage by `strategy.pipeline.partition`; JobError where a list does not fit."""
    if isinstance(method, list):
        try:
            return partition_explicit(method, len(layer_parameters), stages)
        except LayoutError as error:
            raise JobError(str(error)) from None
    if method == "parameters" and len(layer_parameters) >= stages:
        return partition_by_weight(layer_parameters, stages)
    # A layer without parameters, such as an activation, goes with the one before it: on a stage of
    # its own it would leave nothing to train there.
    trained = [i for i, size in enumerate(layer_parameters) if size]
    if len(trained) < stages:
        return partition_uniform(len(layer_parameters), stages)
    groups = partition_uniform(len(trained), stages)
    starts = [0, *(trained[group.start] for group in groups[1:]), len(layer_parameters)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]
