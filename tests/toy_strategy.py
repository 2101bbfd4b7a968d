"""A strategy that is no part of the package: one process, by the engine of `single`.

hybrid compare JOB --strategies tests.toy_strategy
"""

from __future__ import annotations

from typing import Any

from hybrid.config import Job
from hybrid.layout import Layout
from hybrid.strategies.base import Outline, Unsupported

name = "tests.toy_strategy"
summary = "one process, fp32 alone"


def layout(job: Job, nproc: int) -> Layout:
    """One process, whatever is offered."""
    return Layout()


def check(job: Job, layout: Layout, outline: Outline) -> list[str]:
    """fp32 alone, to have something to refuse."""
    if job.train.precision != "fp32":
        raise Unsupported(f"train.precision = {job.train.precision!r}: fp32 alone")
    return []


def period(job: Job) -> int:
    """No communication."""
    return 1


def build(job: Job, layout: Layout, layers: Any, loss: Any) -> Any:
    """The engine of `single`."""
    from hybrid.strategies._replicas import ReplicaEngine

    return ReplicaEngine(job, layout, layers, loss)
