"""A strategy that is no part of the package: one process, by the engine of `single`.

hybrid compare JOB --strategies tests.toy_strategy
"""

from __future__ import annotations

from typing import Any

from hybrid.job.errors import Unsupported
from hybrid.job.schema import Job
from hybrid.launch.placement import Placement
from hybrid.layout import Layout
from hybrid.stages.checks import ModelSummary

name = "tests.toy_strategy"
summary = "one process, fp32 alone"


def layout(job: Job, nproc: int) -> Layout:
    """One process, whatever is offered."""
    return Layout()


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """fp32 alone, to have something to refuse."""
    if job.train.precision != "fp32":
        raise Unsupported(f"train.precision = {job.train.precision!r}: fp32 alone")
    return []


def build(job: Job, placement: Placement, layers: Any, loss: Any) -> Any:
    """The engine of `single`."""
    from hybrid.engines.replicas import ReplicaEngine

    return ReplicaEngine(job, placement, layers, loss)
