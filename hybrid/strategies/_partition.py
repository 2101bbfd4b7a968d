"""Which layers each pipeline stage holds, and what about it cannot be run. Pure Python."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib.metadata import version

from ..config import Job, JobError, Partition, Pipeline
from ..layout import (
    Layout,
    LayoutError,
    partition_by_weight,
    partition_explicit,
    partition_uniform,
)
from ._preflight import check_pipeline
from .base import Outline, Unsupported

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


def check_stages(name: str, job: Job, layout: Layout, outline: Outline) -> list[str]:
    """Raise Unsupported for a model that cannot be cut so, or a DeepSpeed that trains pipelines
    wrongly; returns warnings. `name`: pipeline or 2d."""
    check_release(version("deepspeed"))
    if outline.cut_problem:
        raise Unsupported(outline.cut_problem)
    settings = job.settings(name)
    assert isinstance(settings, Pipeline)
    sizes = outline.layer_parameters
    parts = partition(settings.partition, sizes, layout.pp)
    found = check_pipeline(name, job, layout, parts, sizes, outline.boundaries)
    if found.problems:
        raise Unsupported(found.problems[0])
    return found.warnings


def check_release(deepspeed: str) -> None:
    """Raise Unsupported for a DeepSpeed known to compute wrong pipeline gradients."""
    numbers = tuple(int(n) for n in deepspeed.split("+")[0].split(".")[:3])
    if numbers < FIRST_RIGHT_DEEPSPEED:
        needed = ".".join(map(str, FIRST_RIGHT_DEEPSPEED))
        raise Unsupported(
            f"deepspeed {deepspeed} trains pipelines on wrong gradients when it accumulates "
            f"(deepspeedai/DeepSpeed#8152); {needed} or later is needed"
        )
