"""Measures a few steps of one row: their time, or what they call.

Both are contexts that a row enters around its steps, in the thread in which it makes them.
"""

import collections
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

from hybrid.measure.traffic import CollectiveCounter

HOST_READ = "_local_scalar_dense"  # behind every item(), float() and bool() of a tensor
LISTS = ("tolist", "numpy")  # on a CPU they read a whole tensor without any operator


class Clock:
    """Takes the wall time, and the CPU time of this process with all its threads, in seconds."""

    wall = cpu = 0.0

    def __enter__(self) -> "Clock":
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.cpu = time.process_time() - self.cpu
        self.wall = time.perf_counter() - self.wall


class Operations(TorchDispatchMode):
    """Counts aten's operators by name, those inside a DTensor's operation too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(kind) for kind in types):
            return NotImplemented  # the DTensor then runs its parts, which come here
        if func.namespace == "aten":
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Counting:
    """Counts aten's operators, the collectives, and tensors that are read as lists."""

    def __init__(self) -> None:
        self.operations, self.collectives = Operations(), CollectiveCounter()
        self.lists = 0

    def __enter__(self) -> "Counting":
        self.collectives.start()
        self.operations.__enter__()
        for name in LISTS:
            setattr(torch.Tensor, name, self._noted(getattr(torch.Tensor, name)))
        return self

    def __exit__(self, *exception: Any) -> None:
        for name in LISTS:
            delattr(torch.Tensor, name)  # the class inherits it, and has none of its own
        self.operations.__exit__(None, None, None)
        self.collectives.stop()

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def note_and_call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.lists += 1
            return method(tensor, *args, **kwargs)

        return note_and_call

    def counts(self, steps: int) -> dict[str, Any]:
        """Return what was counted, for each of so many steps.

        `host_reads` are also among the operators. Bytes are of payload: whole tensors."""
        calls = self.operations.calls
        collectives = {
            name: {"calls": count.calls / steps, "bytes": count.payload_bytes / steps}
            for name, count in sorted(self.collectives.counts().items())
        }
        return {
            "aten": calls.total() / steps,
            "host_reads": calls[HOST_READ] / steps,
            "lists": self.lists / steps,
            "calls": sum(each["calls"] for each in collectives.values()),
            "bytes": sum(each["bytes"] for each in collectives.values()),
            "collectives": collectives,
            "by_name": {name: count / steps for name, count in sorted(calls.items())},
            "not_counted": self.collectives.not_counted(),
        }


def step_losses(made: Sequence[Any]) -> list[float]:
    """Return the losses of single steps from what a row's steps returned.

    That is a number, a list of numbers (of the steps whose results have come) or a list of tensors
    (of the micro-batches of one step)."""
    losses: list[float] = []
    for value in made:
        if isinstance(value, float):
            losses.append(value)
        elif value and isinstance(value[0], torch.Tensor):
            losses.append(statistics.fmean(loss.item() for loss in value))
        else:
            losses += value
    return losses
