"""This strategy is local SGD: ranks step alone, and average parameters every N steps or epoch.

Stich 2019, https://arxiv.org/abs/1805.09767. With `emulate_replicas = R` one process does the work
of R ranks. A real run is compared with this emulation, since between merges local SGD is another
algorithm than `single`."""

from ..job.errors import JobError, Unsupported
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary
from .protocol import Engine, Layers, Loss

name = "local_sgd"
summary = "replicas step alone; parameters averaged every `sync_every` steps or epoch"


def layout(job: Job, nproc: int) -> Layout:
    """Make all processes replicas; an emulation is one process with `emulate_replicas` of them."""
    replicas = job.strategy.local_sgd.emulate_replicas
    if replicas and nproc != 1:
        raise Unsupported(f"emulate_replicas = {replicas} runs in one process, not in {nproc}")
    if job.strategy.local_sgd.move_weights and not replicas:
        raise JobError("strategy.local_sgd.move_weights: is for emulate_replicas alone")
    return Layout(dp=replicas or nproc, replicate=replicas or nproc)


def steps_between_syncs(job: Job) -> int:
    """Return the optimizer steps between two merges; raises JobError if they are not known yet."""
    every = job.strategy.local_sgd.sync_every
    if not isinstance(every, int):
        raise JobError("strategy.local_sgd.sync_every = 'epoch': its length in steps is not known")
    return every


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Raise Unsupported where an evaluation would come between two merges."""
    asked = job.checkpoint
    evaluations = {
        "train.eval_every": job.train.eval_every,
        "checkpoint.best: checkpoint.every": asked.every if asked.evaluates else 0,
    }
    for key, steps in evaluations.items():
        if layout.dp > 1 and steps and steps % (every := steps_between_syncs(job)):
            raise Unsupported(
                f"{key} = {steps}: replicas have no common weights to evaluate between merges; "
                f"valid: multiples of strategy.local_sgd.sync_every = {every}"
            )
    return []


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Make this rank's replica, or all of them in an emulation."""
    from ..engines.replicas import ReplicaEngine

    settings = job.strategy.local_sgd
    every, replicas = steps_between_syncs(job), settings.emulate_replicas or 1
    return ReplicaEngine(job, placement, layers, loss, every, replicas, settings.move_weights)
