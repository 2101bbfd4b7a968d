"""Which layers each pipeline stage holds, and what about it cannot be run. Pure Python."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.metadata import version

from ..config import JobError, Partition
from ..layout import (
    LayoutError,
    partition_by_weight,
    partition_explicit,
    partition_uniform,
)
from .base import Unsupported

# Earlier ones scale gradients wrongly with more than one micro-batch: deepspeedai/DeepSpeed#7773,
# #8152; mended by #8154.
FIRST_RIGHT_DEEPSPEED = (0, 19, 3)


def partition(method: Partition, layer_parameters: Sequence[int], stages: int) -> list[range]:
    """Layers of each stage by `strategy.pipeline.partition`; JobError where a list does not fit."""
    if isinstance(method, list):
        try:
            return partition_explicit(method, len(layer_parameters), stages)
        except LayoutError as error:
            raise JobError(str(error)) from None
    if method == "parameters":
        return partition_by_weight(layer_parameters, stages)
    # A layer without parameters, such as an activation, goes with the one before it: on a stage of
    # its own it would leave nothing to train there.
    trained = [i for i, size in enumerate(layer_parameters) if size]
    if len(trained) < stages:
        return partition_uniform(len(layer_parameters), stages)
    groups = partition_uniform(len(trained), stages)
    starts = [0, *(trained[group.start] for group in groups[1:]), len(layer_parameters)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def check_stages(method: Partition, layer_parameters: Sequence[int], stages: int) -> None:
    """Raise Unsupported for more stages than layers, a stage without parameters, a DeepSpeed that
    trains pipelines wrongly."""
    check_release(version("deepspeed"))
    layers = len(layer_parameters)
    if stages > layers:
        plural = "layer" if layers == 1 else "layers"
        raise Unsupported(f"the model has {layers} {plural}, {stages} stages need as many or more")
    for stage, part in enumerate(partition(method, layer_parameters, stages)):
        if not sum(layer_parameters[i] for i in part):
            raise Unsupported(
                f"stage {stage} (layers {part.start} to {part.stop - 1}) would have no parameters "
                f"to train under partition = {method!r}; cut elsewhere or use fewer stages"
            )


def check_release(deepspeed: str) -> None:
    """Raise Unsupported for a DeepSpeed known to compute wrong pipeline gradients."""
    numbers = tuple(int(n) for n in deepspeed.split("+")[0].split(".")[:3])
    if numbers < FIRST_RIGHT_DEEPSPEED:
        needed = ".".join(map(str, FIRST_RIGHT_DEEPSPEED))
        raise Unsupported(
            f"deepspeed {deepspeed} trains pipelines on wrong gradients when it accumulates "
            f"(deepspeedai/DeepSpeed#8152); {needed} or later is needed"
        )
