"""This module holds a model's sizes against its data, without running the model.

A large model has no values when it is checked, so that it is not tried out: these checks are what
there is then. Without them torch would raise in the ranks, and not name the job's key."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ..job.errors import JobError
from ..job.schema import Job
from ..models import FAMILIES
from ..models.layers import Layers
from ..stages.checks import Boundary


def check_sizes(job: Job, layers: Layers, train_set: Sequence[Any]) -> None:
    """Raise JobError where an embedding has too few rows for the data."""
    embeddings = [(n, m) for n, m in _named(layers) if isinstance(m, nn.Embedding)]
    wanted = getattr(train_set, "vocab_size", None)
    if wanted and embeddings and embeddings[0][1].num_embeddings < wanted:
        raise JobError(
            f"model.options.vocab_size = {embeddings[0][1].num_embeddings}: the data's tokens need "
            f"{wanted} or more"
        )
    tokens = getattr(train_set, "context", 0)
    for name, module in embeddings:
        # The names of tables of learned positions: transformers' wpe, embed_positions and others.
        if ("position" in name or name.endswith("wpe")) and module.num_embeddings < tokens:
            raise JobError(
                f"data.options.context = {tokens}: {name} of model.name = {job.model.name!r} has "
                f"{module.num_embeddings} positions; valid: 1 to {module.num_embeddings}"
            )


def _named(layers: Layers) -> Iterator[tuple[str, nn.Module]]:
    """List the modules of all layers by name, each once."""
    model: Iterable[nn.Module] = [layers.model] if hasattr(layers, "model") else layers
    for part in model:
        yield from part.named_modules()


def require_passes(job: Job, boundaries: Sequence[Boundary]) -> None:
    """Raise JobError where a layer of a shipped family does not take what it is given.

    boundaries: what the layers returned for samples of the data, without memory or compute."""
    if job.model.name not in FAMILIES or not boundaries or not boundaries[-1].unknown:
        return
    last = boundaries[-1]
    given = "a sample" if not last.after_layer else "what the layer before it returns"
    raise JobError(
        f"model.name = {job.model.name!r}: layer {last.after_layer} cannot take {given} of "
        f"data.name = {job.data.name!r}: {last.unknown}"
    )
