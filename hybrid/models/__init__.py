"""Models: one file a family. A model is a flat list of layers plus a loss given as (sum, count).

A model function takes the job's `model.options` as keyword arguments and returns `(layers, loss)`:
`layers` a list of `nn.Module`, each taking what the one before returned; `loss(output, target)`
returns `(sum, count)`, the loss summed over the micro-batch's targets and how many it counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Job, JobError
from ..importing import call_named

if TYPE_CHECKING:
    from torch import nn

    from .losses import Loss

FAMILIES = {"linear": "hybrid.models.linear:linear", "mlp": "hybrid.models.mlp:mlp"}


def build_model(job: Job) -> tuple[list[nn.Module], Loss]:
    """The whole model, initialised from the job's seed: the same on every rank and in every run.

    Raises JobError where the name, the options or what the function returned are wrong.
    """
    import torch

    torch.manual_seed(job.train.seed)
    built = call_named("model", job.model.name, job.model.options, FAMILIES)
    two = isinstance(built, tuple) and len(built) == 2 and callable(built[1])
    if not (two and isinstance(built[0], (list, tuple))):
        raise JobError(f"model.name = {job.model.name!r}: must return (layers, loss)")
    layers = list(built[0])
    for i, layer in enumerate(layers):
        if not isinstance(layer, torch.nn.Module):
            raise JobError(
                f"model.name = {job.model.name!r}: layer {i} is a {type(layer).__name__}, "
                "each layer must be an nn.Module"
            )
    if not any(p.requires_grad for layer in layers for p in layer.parameters()):
        raise JobError(f"model.name = {job.model.name!r}: has no parameter to train")
    return layers, built[1]
