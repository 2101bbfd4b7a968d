"""This package holds the models, one file a family; a model is layers or a module, with a loss.

A model function takes the job's `model.options` as keyword arguments and returns `(layers, loss)`
or `(module, loss)`. `layers` is a list of `nn.Module`, each of which takes what the one before
returned, or a `layers.Layers`; `module` is any `nn.Module`. `losses.as_loss` says which losses are
valid. `hf:NAME_OR_PATH` is the function `hybrid.models.hf:hf` with that name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..job.errors import JobError
from ..job.imports import call_named, check_name
from ..job.schema import Job
from ..job.trust import HF as HF

if TYPE_CHECKING:
    from .layers import Layers
    from .losses import Loss

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


def without_weights(job: Job) -> Job:
    """Returns the job for a model whose weights are all going to be replaced: it loads none."""
    model = job.model.model_copy(update={"weights": None})
    if model.name.startswith(HF):
        model = model.model_copy(update={"options": {**model.options, "weights": False}})
    return job.model_copy(update={"model": model})


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


def _call_on_meta(job: Job) -> Any:
    from ..launch.freed_memory import map_large_blocks
    from .first_values import KEY, parameters_on_meta
    from .hf.probe import NotOnMeta

    map_large_blocks()  # parameters have memory for a moment, which would stay on the heap
    try:
        with parameters_on_meta():
            return _call(job)
    except NotOnMeta as error:
        raise JobError(f"{KEY}: the model needs values while it is made: {error}") from None
    except JobError as error:
        if "meta" not in str(error):
            raise
        raise JobError(f"{KEY}: {error}") from None


def made_whole(job: Job) -> Job:
    """Returns the job for a model that is made with all its values, in one process."""
    model = job.model.model_copy(update={"on_meta": False})
    return job.model_copy(update={"model": model})


def build_model(job: Job) -> tuple[Layers, Loss]:
    """Builds the whole model from the job's seed, the same on every rank and in every run.

    It has the weights in `model.weights`, where the job names any (`hybrid.models.starting`). With
    `model.on_meta` its parameters have no values, and `Layers.fill` gives them.
    Raises JobError where the name, the options or what the function returned are wrong."""
    import torch

    from .brought import as_layers, split_built
    from .losses import as_loss

    torch.manual_seed(job.train.seed)
    built = _call_on_meta(job) if job.model.on_meta else _call(job)
    try:
        model, loss = split_built(built)
        layers, taken = as_layers(model, own_loss=loss is None), as_loss(loss)
    except ValueError as error:
        raise JobError(f"model.name = {job.model.name!r}: {error}") from None
    if not any(p.requires_grad for layer in layers for p in layer.parameters()):
        raise JobError(f"model.name = {job.model.name!r}: has no parameter to train")
    if job.model.weights is not None:
        from .starting import start_from

        layers.weights_from = start_from(job, layers)
    elif job.model.on_meta:
        from .starting import start_on_meta

        start_on_meta(job, layers)
    return layers, taken
