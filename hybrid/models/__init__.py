"""This package holds the models, one file a family; a model is a list of layers with a loss.

A model function takes the job's `model.options` as keyword arguments and returns `(layers, loss)`.
`layers` is a list of `nn.Module`, each of which takes what the one before returned, or a
`layers.Layers`. `loss(output, target)` returns `(sum, count)`: the loss summed over the
micro-batch's targets, and how many it counted. `hf:NAME_OR_PATH` is the function
`hybrid.models.hf:hf` with that name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..job.errors import JobError
from ..job.imports import call_named, check_name
from ..job.schema import Job

if TYPE_CHECKING:
    from .layers import Layers
    from .losses import Loss

HF = "hf:"
FAMILIES = {
    "linear": "hybrid.models.linear:linear",
    "mlp": "hybrid.models.mlp:mlp",
    "gpt": "hybrid.models.gpt:gpt",
}


def check_model_name(name: str) -> None:
    """Raises JobError unless a job may name a model so."""
    if name == HF:
        raise JobError("model.name = 'hf:': valid: hf:NAME_OR_PATH, a hub name or a folder")
    if not name.startswith(HF):
        check_name("model", name, [*FAMILIES, "hf:NAME_OR_PATH"])


def can_be_made_on_meta(job: Job) -> bool:
    """Says whether the job's model can be made without values, on torch's meta device.

    A user's own function cannot, since it may compute with the values."""
    return job.model.name in FAMILIES or job.model.name.startswith(HF)


def _call(job: Job) -> Any:
    name, options = job.model.name, job.model.options
    check_model_name(name)
    if name.startswith(HF):
        name, options = "hf", {"source": name.removeprefix(HF), **options}
    return call_named("model", name, options, FAMILIES | {"hf": "hybrid.models.hf:hf"})


def build_model(job: Job) -> tuple[Layers, Loss]:
    """Builds the whole model from the job's seed, the same on every rank and in every run.

    Raises JobError where the name, the options or what the function returned are wrong."""
    import torch

    from .layers import Layers
    from .losses import as_loss
    from .own_loss import CUT_PROBLEM, OwnLoss

    torch.manual_seed(job.train.seed)
    built, given = _call(job), f"model.name = {job.model.name!r}"
    two = isinstance(built, tuple) and len(built) == 2 and callable(built[1])
    if not (two and isinstance(built[0], (list, tuple))):
        raise JobError(f"{given}: must return (layers, loss)")
    layers = built[0] if isinstance(built[0], Layers) else Layers(built[0])
    for i, layer in enumerate(layers):
        if not isinstance(layer, torch.nn.Module):
            kind = type(layer).__name__
            raise JobError(f"{given}: layer {i} is a {kind}, each layer must be an nn.Module")
    if not any(p.requires_grad for layer in layers for p in layer.parameters()):
        raise JobError(f"{given}: has no parameter to train")
    try:
        loss = as_loss(built[1])
    except ValueError as error:
        raise JobError(f"{given}: {error}") from None
    if isinstance(loss, OwnLoss):
        layers.cut_problem = CUT_PROBLEM
    return layers, loss
