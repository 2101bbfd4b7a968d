"""This module finds batch norms, and keeps padding out of their statistics.

In training a batch norm normalises each sample by the statistics of the samples beside it, so what
it computes depends on how a batch is cut into micro-batches."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..job.errors import RunError
from .dropout import num_real, rows_in_use
from .layers import Layers


def find_batch_norms(layers: Layers) -> list[str]:
    """Names the batch norms of a model, such as `0.norm (BatchNorm1d)`."""
    names = {id(tensor): name for name, tensor in layers.tensors().items()}
    found = []
    for module in layers.modules():
        if isinstance(module, _BatchNorm):
            held = (module.running_mean, module.weight)
            own = next((names[id(t)] for t in held if id(t) in names), "")
            found.append(f"{own.rpartition('.')[0]} ({type(module).__name__})".strip())
    return found


def leave_padding_out(modules: Iterable[nn.Module]) -> None:
    """Makes batch norms take their statistics of the real rows of a padded micro-batch alone."""
    for module in modules:
        if isinstance(module, _BatchNorm) and not leaves_padding_out(module):
            kind: Any = type(module)
            module.__class__ = _without_padding(kind)


def leaves_padding_out(module: nn.Module) -> bool:
    """Tells whether a module is a batch norm that `leave_padding_out` has changed."""
    return getattr(module, "leaves_padding_out", False)


@functools.cache
def _without_padding(kind: Any) -> Any:
    """Makes a subclass with the same name, so that names and FSDP's classes stay as they are."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **options: Any) -> Any:
        seeds = rows_in_use() if self.training else None
        if not seeds or len(seeds) == (real := num_real(seeds)):
            return kind.forward(self, x, *args, **options)
        each, rest = divmod(x.shape[0], len(seeds))
        if rest:
            raise RunError(
                f"a {kind.__name__} got {x.shape[0]} rows of a micro-batch of {len(seeds)}, of "
                f"which {len(seeds) - real} are padding: it cannot tell which; choose "
                "train.global_batch so that it divides evenly"
            )
        if not real:  # weight and bias stay in the graph, where DDP looks for them
            mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
            return nn.functional.batch_norm(x, mean, var, self.weight, self.bias)
        out = kind.forward(self, x[: real * each], *args, **options)
        return torch.cat([out, out.new_zeros(x.shape[0] - real * each, *out.shape[1:])])

    return type(kind.__name__, (kind,), {"forward": forward, "leaves_padding_out": True})
