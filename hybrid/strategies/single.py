"""This strategy is one process in plain torch. Every other run is compared with it."""

from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from .protocol import Engine, Layers, Loss

name = "single"
summary = "one process, plain torch: the reference"


def layout(job: Job, nproc: int) -> Layout:
    """Take one process, however many there could be."""
    return Layout()


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Make one replica that trains on all samples."""
    from ..engines.replicas import ReplicaEngine

    moved = job.strategy.single.move_weights
    return ReplicaEngine(job, placement, layers, loss, moved=moved)
