"""This strategy is one process in plain torch. Every other run is compared with it.

With `emulate_ranks = R` it cuts each batch into the shares of R data-parallel ranks, and buffers
move as theirs do. Runs of a model with batch norm are compared with that."""

from ..job.errors import Unsupported
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from .protocol import Engine, Layers, Loss

name = "single"
summary = "one process, plain torch: the reference"


def layout(job: Job, nproc: int) -> Layout:
    """Take one process, however many there could be; it may play several data-parallel ranks."""
    ranks = job.strategy.single.emulate_ranks
    if ranks and nproc != 1:
        raise Unsupported(f"emulate_ranks = {ranks} runs in one process, not in {nproc}")
    return Layout(dp=ranks or 1, replicate=ranks or 1)


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Make one replica that trains on all samples."""
    from ..engines.replicas import ReplicaEngine

    settings = job.strategy.single
    moved, shares = settings.move_weights, settings.emulate_ranks or 1
    return ReplicaEngine(job, placement, layers, loss, moved=moved, shares=shares)
