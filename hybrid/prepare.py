"""What must be known of a job before any process starts: that its model and data can be made, how
many steps it takes, how many parameters each layer has."""

from __future__ import annotations

import dataclasses

from .config import Job, resolve_lengths


@dataclasses.dataclass(frozen=True)
class Prepared:
    """`job` has its lengths in steps; `layer_parameters` counts what each layer can train."""

    job: Job
    layer_parameters: list[int]


def prepare(job: Job) -> Prepared:
    """Make the model and the data once, here; JobError where the job is wrong. Imports torch."""
    from .data import build_data
    from .models import build_model

    layers, _ = build_model(job)
    sizes = [sum(p.numel() for p in x.parameters() if p.requires_grad) for x in layers]
    train_set, _ = build_data(job)
    return Prepared(resolve_lengths(job, len(train_set)), sizes)
