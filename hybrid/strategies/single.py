"""One process, plain torch: the reference that every other run is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Job
from ..layout import Layout
from .base import Engine, Outline

if TYPE_CHECKING:
    from ..models.layers import Layers
    from ..models.losses import Loss

name = "single"
summary = "one process, plain torch: the reference"


def layout(job: Job, nproc: int) -> Layout:
    """One process, whatever is offered."""
    return Layout()


def check(job: Job, layout: Layout, outline: Outline) -> list[str]:
    """Runs everything."""
    return []


def period(job: Job) -> int:
    """No communication."""
    return 1


def build(job: Job, layout: Layout, layers: Layers, loss: Loss) -> Engine:
    """One replica with all samples."""
    from ._replicas import ReplicaEngine

    return ReplicaEngine(job, layout, layers, loss)
