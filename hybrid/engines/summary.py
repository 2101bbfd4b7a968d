"""This module summarises a whole model, and what its job asks of it, before it is placed."""

from collections.abc import Sequence

from ..job.schema import Job
from ..models.batch_norms import find_batch_norms
from ..models.layers import Layers
from ..stages.checks import Boundary, ModelSummary
from .optimizer_trial import check_optimizer


def summarise(
    job: Job,
    layers: Layers,
    cut_problem: str | None = None,
    boundaries: Sequence[Boundary] = (),
    tried: bool = False,
) -> ModelSummary:
    """Return what strategies check a job by; raises JobError where its own optimizer is no good.

    cut_problem: why the model cannot be cut, besides what the layers say themselves. tried: the
    optimizer was tried before."""
    names = layers.names()
    return ModelSummary(
        layer_parameters=layers.sizes(),
        cut_problem=layers.cut_problem or cut_problem,
        boundaries=tuple(boundaries),
        scalars=[name for p, name in names.items() if p.dim() == 0],
        empty={name: p.requires_grad for p, name in names.items() if p.numel() == 0},
        optimizer_problems={} if tried else check_optimizer(job, layers),
        batch_norms=tuple(find_batch_norms(layers)),
    )
