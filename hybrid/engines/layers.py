"""What is done to a model's layers before any engine takes them, alike under every strategy, and
the randomness of each forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..job.schema import Job
from ..models.dropout import mix, number_dropouts, rows_in_use, set_rows, use_rows
from ..models.layers import Layers
from .precision import DTYPES, round_inputs


def prepare_layers(job: Job, layers: Layers) -> Layers:
    """Give the whole model what the job asks of every layer: dropout that depends on the sample,
    inputs in the job's precision, recomputed activations, compilation."""
    number_dropouts(layers.modules())
    round_inputs(layers, DTYPES[job.train.precision])
    for block in layers.blocks():
        if job.train.activation_checkpointing:
            block.__class__ = _checkpointed(type(block))  # type: ignore[arg-type]
        if job.train.compile:
            block.compile()
    return layers


@functools.cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """A class like `kind` that keeps no activations and computes them again in backward.

    A subclass in place of a wrapper: names of parameters, and the class name that FSDP looks for,
    stay as they are.
    """

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        inner = functools.partial(kind.forward, self)
        if not torch.is_grad_enabled():
            return inner(*args, **options)
        return checkpoint(inner, *args, use_reentrant=False, context_fn=_same_rows, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "recomputed": True})


def compile_evidence(job: Job) -> tuple[dict[str, Any], dict[str, bool]]:
    """What torch.compile really made in this process, and what must hold of it: it leaves out a
    layer that it cannot take, and says nothing."""
    if not job.train.compile:
        return {}, {}
    from torch._dynamo.utils import counters

    graphs = int(counters["stats"]["unique_graphs"])
    return {"compiled_graphs": graphs}, {"layers are compiled": graphs > 0}


def _same_rows() -> tuple[Any, Any]:
    """Contexts of a pass and of its repetition, which may come while another micro-batch's rows are
    in use."""
    return contextlib.nullcontext(), use_rows(rows_in_use())


@contextlib.contextmanager
def sample_seeds(
    job: Job, step: int, place: Sequence[int], ids: torch.Tensor, rows: int
) -> Iterator[None]:
    """Seeds around one forward pass of training on `rows` rows: the samples `ids`, then padding.

    Our dropout is seeded by sample; torch's own generator by `place` (share, micro-batch, stage),
    so that whatever else draws is the same in two runs of one layout.
    """
    torch.manual_seed(mix(job.train.seed, step, *place))
    with use_rows(_seeds(job, step, ids, rows)):
        yield


def set_sample_seeds(
    job: Job, step: int, place: Sequence[int], ids: torch.Tensor, rows: int
) -> None:
    """`sample_seeds` for an engine that calls the model by itself, until the next call."""
    torch.manual_seed(mix(job.train.seed, step, *place))
    set_rows(_seeds(job, step, ids, rows))


def _seeds(job: Job, step: int, ids: torch.Tensor, rows: int) -> list[int | None]:
    seeds = [mix(job.train.seed, step, sample) for sample in ids.tolist()]
    return [*seeds, *[None] * (rows - len(seeds))]
