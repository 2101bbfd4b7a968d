"""This module has the protocol of every strategy: it knows what it can run, and builds an engine.

A file of this folder is a strategy itself, or offers several (`zero`). What a strategy leaves out
has a default here. The module needs no torch."""

from typing import TYPE_CHECKING, Any, Protocol

from ..engines.protocol import Engine
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary

if TYPE_CHECKING:
    from ..models.layers import Layers
    from ..models.losses import Loss
else:  # strategies name these in annotations alone, and the modules import torch
    Layers = Loss = Any

REQUIRED = ("name", "summary", "layout", "build")


class Strategy(Protocol):
    """Says what a strategy must offer.

    It may also offer `check` and `steps_between_syncs`, which take and return what the functions of
    these names below do, without the strategy, and `modules`: the names of modules whose import
    takes its ranks long, so that the process that forks them imports these once, or a function that
    returns them for a job (None: for the default settings)."""

    name: str
    summary: str

    def layout(self, job: Job, nproc: int) -> Layout:
        """Return the degrees on `nproc` processes.
        Raises Unsupported, or LayoutError if the job's own degrees do not fit."""

    def build(self, job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
        """Put the whole, initialised model on this rank's part of the layout; collective."""


def check(strategy: Strategy, job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Return warnings about a job, a line each, before any process starts.

    Raises Unsupported if the job cannot run like this. A strategy without a `check` runs every
    job."""
    own = getattr(strategy, "check", None)
    return own(job, layout, summary) if own else []


def steps_between_syncs(strategy: Strategy, job: Job) -> int:
    """Return the optimizer steps after which the communication repeats; 1 is the default."""
    own = getattr(strategy, "steps_between_syncs", None)
    return own(job) if own else 1
