"""The protocol that every strategy keeps: it knows what it can run, and builds an engine. No torch.

A file of this folder is a strategy itself, or offers several (`zero`). What a strategy leaves out
has a default here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary

if TYPE_CHECKING:
    from ..engines.protocol import Engine
    from ..models.layers import Layers
    from ..models.losses import Loss

REQUIRED = ("name", "summary", "layout", "build")


class Strategy(Protocol):
    """What a strategy offers. It may also offer `check` and `steps_between_syncs`, which take and
    return what the functions of these names below do."""

    name: str
    summary: str

    def layout(self, job: Job, nproc: int) -> Layout:
        """Degrees on `nproc` processes; raises Unsupported, or LayoutError for the job's own."""
        ...

    def build(self, job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
        """Put the whole, initialised model on this rank's part of the layout; collective."""
        ...


def check(strategy: Strategy, job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Raises Unsupported where this job cannot run so, before any process starts. Returns warnings,
    a line each. A strategy without a `check` runs every job."""
    own = getattr(strategy, "check", None)
    return own(job, layout, summary) if own else []


def steps_between_syncs(strategy: Strategy, job: Job) -> int:
    """Optimizer steps after which the communication repeats; 1 unless the strategy says more."""
    own = getattr(strategy, "steps_between_syncs", None)
    return own(job) if own else 1
