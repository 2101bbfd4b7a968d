"""This module keeps what a communication hook of DDP remembers from step to step.

Hooks that send gradients in bf16 or fp16 remember nothing. PowerSGD does: what its approximation
left out of each bucket, which it adds to the next gradient, the factors that it begins with, its
count of iterations and its generator (Vogels et al. 2019, https://arxiv.org/abs/1905.13727). Each
rank has an error of its own, so this belongs to ranks, and means nothing in another layout."""

from collections.abc import Mapping
from typing import Any

import numpy
import torch

from .protocol import OwnState

_LABEL = "powersgd"
# By bucket (torch/distributed/algorithms/ddp_comm_hooks/powerSGD_hook.py).
_TENSORS = ("error_dict", "p_memory_dict", "q_memory_dict")
_NUMBERS = (
    "iter", "total_numel_before_compression", "total_numel_after_compression", "next_stats_report",
)  # fmt: skip


def read_hook(model: Any, settings: Mapping[str, Any]) -> OwnState:
    """Return what this rank's hook remembers; nothing where it has none that does.

    settings: by which gradients are cut into buckets, and approximated."""
    state = _state_of(model)
    if state is None:
        return OwnState({}, {})
    tensors = {
        f"{_LABEL}/{kind}/{bucket}": tensor
        for kind in _TENSORS
        for bucket, tensor in getattr(state, kind).items()
    }
    _, keys, *place = state.rng.get_state()
    tensors[f"{_LABEL}/rng"] = torch.from_numpy(keys.astype(numpy.int64))
    numbers = {name: getattr(state, name) for name in _NUMBERS}
    return OwnState(tensors, {_LABEL: numbers | {"place": place, "settings": dict(settings)}})


def put_hook(model: Any, settings: Mapping[str, Any], own: OwnState | None) -> str | None:
    """Take over what `read_hook` returned, or begin anew, and then say so where it matters."""
    state = _state_of(model)
    saved = own.numbers.get(_LABEL) if own else None
    if state is None:
        forgotten = "a PowerSGD hook's errors are in the checkpoint, and this run has no such hook"
        return forgotten if saved else None
    for kind in _TENSORS:
        getattr(state, kind).clear()
    if own is None or saved is None or saved["settings"] != dict(settings):
        for name in _NUMBERS:  # a rehearsal has counted an iteration
            setattr(state, name, 0)
        return (
            "PowerSGD begins anew: its errors and factors are those of ranks and buckets, and the "
            "checkpoint has none for these"
        )
    device = next(model.parameters()).device
    for label in own.tensors:
        if label.startswith(f"{_LABEL}/") and label != f"{_LABEL}/rng":
            _, kind, bucket = label.split("/")
            getattr(state, kind)[int(bucket)] = own.tensors[label].to(device)
    for name in _NUMBERS:
        setattr(state, name, saved[name])
    keys = own.tensors[f"{_LABEL}/rng"].numpy().astype(numpy.uint32)
    state.rng.set_state(("MT19937", keys, *saved["place"]))
    return None


def _state_of(model: Any) -> Any:
    """Return the state of a model's PowerSGD hook, None where it has no such."""
    for _, state in getattr(model, "_comm_hooks", []):
        if all(hasattr(state, name) for name in (*_TENSORS, *_NUMBERS)):
            return state
    return None
