"""One process, plain torch: the reference that every other run is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engines.protocol import Engine
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout

if TYPE_CHECKING:
    from ..models.layers import Layers
    from ..models.losses import Loss

name = "single"
summary = "one process, plain torch: the reference"


def layout(job: Job, nproc: int) -> Layout:
    """One process, whatever is offered."""
    return Layout()


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """One replica with all samples."""
    from ..engines.replicas import ReplicaEngine

    return ReplicaEngine(job, placement, layers, loss)
