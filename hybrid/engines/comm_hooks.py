"""This module makes hooks of DDP that run on gloo, and keeps what one remembers from step to step.

Hooks that send gradients in bf16 or fp16 remember nothing. PowerSGD does: what its approximation
left out of each bucket, which it adds to the next gradient, the factors that it begins with, its
count of iterations and its generator (Vogels et al. 2019, https://arxiv.org/abs/1905.13727). Each
rank has an error of its own, so this belongs to ranks, and means nothing in another layout."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch

from ..launch.waiting import waiting
from .protocol import OwnState

_LABEL = "powersgd"
# By bucket (torch/distributed/algorithms/ddp_comm_hooks/powerSGD_hook.py).
_TENSORS = ("error_dict", "p_memory_dict", "q_memory_dict")
_NUMBERS = (
    "iter", "total_numel_before_compression", "total_numel_after_compression", "next_stats_report",
)  # fmt: skip


def bf16_hook() -> Callable[..., Any]:
    """Return torch's bf16 hook under another name, so that torch accepts it on gloo.
    Under its own name torch takes it on NCCL and XCCL only (torch/nn/parallel/distributed.py),
    though gloo all-reduces bf16 as well."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    def bf16_hook_on_gloo(state: Any, bucket: Any) -> Any:
        return bf16_compress_hook(state, bucket)

    bf16_hook_on_gloo.__annotations__ = dict(bf16_compress_hook.__annotations__)  # DDP reads them
    return bf16_hook_on_gloo


def powersgd_on_gloo(options: dict[str, Any]) -> tuple[Any, Callable[..., Any]]:
    """Return PowerSGD's state, and its hook, which ends with a bucket before it begins another.

    The hook begins its second and third all-reduce of a bucket in callbacks. gloo runs these in its
    own threads, so that ranks began them before the next bucket's first one or after, and gloo took
    one for the other: runs with several buckets aborted or waited for ever."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

    @functools.wraps(powersgd.powerSGD_hook)  # DDP reads the annotations
    def wait_for_bucket(state: Any, bucket: Any) -> Any:
        ended = powersgd.powerSGD_hook(state, bucket)
        with waiting("the reduction of gradients"):
            ended.wait()
        return ended

    return powersgd.PowerSGDState(None, **options), wait_for_bucket


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
