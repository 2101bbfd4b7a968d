"""This module has the calls of torch that wait for other ranks say so (`hybrid.launch.waiting`).

Every wait of Python's ends in `Work.wait`: that of `torch.distributed`'s functions, of DeepSpeed,
of FSDP2 and of torch's pipelines. Functional collectives have `wait_tensor`. What DDP waits for
inside C++ is marked at the function that begins it, and the end of its backward pass by a callback
of autograd, which runs once all gradients are computed and before DDP waits for their reduction.

A collective that only begins is no wait. How many a rank has begun, torch counts itself."""

import functools
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.distributed import _functional_collectives

from .waiting import enter, leave, waiting

_marked: list[tuple[Any, str, Any]] = []  # owner, name, and what was there before
_message_timeout: list[timedelta] = []  # of gloo's messages, at most one
_KINDS: Any = getattr(torch._C._distributed_c10d, "OpType")  # noqa: B009 - typed nowhere
_MESSAGES = {int(kind) for kind in (_KINDS.SEND, _KINDS.RECV, _KINDS.RECVANYSOURCE)}


def _sites() -> Iterator[tuple[Any, str, str]]:
    """Yield each call that waits, as owner and name, and what it waits for.

    They are looked up by name where they are called, so that setting them here is enough."""
    c10d = torch._C._distributed_c10d
    yield _functional_collectives, "wait_tensor", "a collective"
    yield dist, "_broadcast_coalesced", "the buffers or parameters of the first rank"
    yield dist, "_verify_params_across_processes", "the comparison of all ranks' parameters"
    yield c10d.Reducer, "_rebuild_buckets", "DDP's order of its buckets"
    yield c10d.ProcessGroup, "monitored_barrier", "a barrier"
    yield dist.distributed_c10d, "_new_process_group_helper", "a new group of ranks"
    yield dist.distributed_c10d, "_store_based_barrier", "a new group of ranks"


def mark() -> None:
    """Have the calls say that they wait, from now until `unmark`."""
    if _marked:
        return
    work = torch._C._distributed_c10d.Work
    _replace(work, "wait", _in_time(work.wait))
    for owner, name, what in _sites():
        call = getattr(owner, name, None)
        if call is not None:  # a release of torch without it
            _replace(owner, name, _marking(call, what))


def _replace(owner: Any, name: str, call: Any) -> None:
    _marked.append((owner, name, getattr(owner, name)))
    setattr(owner, name, call)


def unmark() -> None:
    """Put the calls back as torch has them."""
    while _marked:
        owner, name, call = _marked.pop()
        setattr(owner, name, call)


def _marking(call: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def wait(*arguments: Any, **named: Any) -> Any:
        with waiting(what):
            return call(*arguments, **named)

    return wait


def set_message_timeout(timeout: timedelta | None) -> None:
    """Set how long gloo waits for a message from now on; None: as long as its group was told."""
    _message_timeout[:] = [] if timeout is None else [timeout]


def _in_time(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Work.wait` that marks, and that waits for a message as long as was set."""

    @functools.wraps(call)
    def wait(work: Any, *arguments: Any, **named: Any) -> Any:
        with waiting("a collective or a message"):
            if _message_timeout and not arguments and not named and _is_message(work):
                return call(work, *_message_timeout)
            return call(work, *arguments, **named)

    return wait


def _is_message(work: Any) -> bool:
    return work._get_op_type() in _MESSAGES


class reducing:
    """Has DDP's backward pass say that it waits, once it has computed all gradients.

    loss: of which `backward` is taken in the context."""

    __slots__ = "_entered", "_thread"

    def __init__(self, loss: torch.Tensor) -> None:
        self._entered, self._thread = False, threading.get_ident()
        loss.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: torch.Tensor) -> None:
        # Callbacks run in the order they were given: DDP gives its own with the last bucket.
        Variable._execution_engine.queue_callback(self._begin)

    def _begin(self) -> None:  # on a GPU it runs in a thread of the device
        self._entered = True
        enter("the reduction of gradients", self._thread)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: Any) -> None:
        if self._entered:
            leave()


def num_begun() -> int:
    """Return how many collectives and messages of the default group this rank has begun."""
    group: Any = dist.group.WORLD
    if group is None:
        return 0
    try:
        return int(group._get_sequence_number_for_group())
    except (RuntimeError, ValueError):  # a backend that does not count
        return 0
