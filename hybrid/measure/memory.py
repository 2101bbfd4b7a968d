"""Peak memory of one rank's tensors, exact enough to hold against a closed form.

    meter = StorageMeter("cpu")
    with meter:                 # from before the model exists, or DDP's buckets are missed
        engine = build(...)
        engine.train_step(...)
    meter.peak_bytes, meter.live_bytes, meter.how

Resident memory is no use here: libraries are hundreds of megabytes of it. On a CPU a dispatch mode
sees each operator's tensors, counts each storage once, and a weak reference tells when it is freed.
That costs some microseconds an operator: meter steps that are not timed. Not seen: what an operator
allocates and frees inside itself. On a CUDA device the allocator counts by itself, at no cost.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)


class _Live(weakref.ref):
    """A weak reference to a storage which knows where and with how many bytes it is counted."""

    __slots__ = ("key", "size")
    key: int
    size: int


class _Watch(TorchDispatchMode):
    """Shows every tensor that an operator takes or returns to `note`."""

    def __init__(self, note: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A DTensor or a collective's result that is still awaited is a wrapper: let it take itself
        # apart first, the operators on its local tensor then come here.
        if types and any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        # Arguments too: what was made while nobody watched, or by no operator, counts once used.
        self._visit(args)
        self._visit(result)
        return result

    def _visit(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._note(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self._visit(item)


def _unwrapped(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor, or the plain ones inside a wrapper such as DTensor."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _unwrapped(getattr(tensor, name))
    else:
        yield tensor


class StorageMeter:
    """Counts the bytes of live tensor storages on one device; a context manager that can be entered
    again. Frees are noticed at any time, new storages while it is entered. One can be entered at a
    time in a process."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self.how = "torch.cuda.max_memory_allocated" if self._cuda else "counted tensor storages"
        # By address; the callback of the weak reference comes before an address is used again.
        self._storages: dict[int, _Live] = {}
        # Changed from other threads and from callbacks without a lock: the interpreter changes
        # threads at calls and jumps, of which a plain `+=` has none.
        self._live = 0
        self._peak = self._before = 0
        self._was_entered = False
        self._exit: contextlib.ExitStack | None = None

    @property
    def live_bytes(self) -> int:
        """Bytes of the storages alive now."""
        return torch.cuda.memory_allocated(self._device) if self._cuda else self._live

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were alive at a time since the first entry."""
        return max(self._before, self.peak_bytes_since_mark)

    @property
    def peak_bytes_since_mark(self) -> int:
        """The most bytes that were alive at a time since the last `mark`, or the first entry."""
        return torch.cuda.max_memory_allocated(self._device) if self._cuda else self._peak

    def mark(self) -> None:
        """Begin a new peak beside the one over all."""
        self._before = self.peak_bytes
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = self._live

    def __enter__(self) -> StorageMeter:
        if self._exit is not None:
            raise RuntimeError("this meter is already entered")
        self._exit = contextlib.ExitStack()
        if self._cuda:
            if not self._was_entered:
                torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._recount()
            self._exit.enter_context(_watched_resize(self._note_storage))
            self._exit.enter_context(_Watch(self._note))
        self._was_entered = True
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._exit is None:
            raise RuntimeError("this meter is not entered")
        self._exit.close()
        self._exit = None

    def adopt(self, tensors: torch.nn.Module | Iterable[torch.Tensor]) -> None:
        """Counts tensors made while not entered, without waiting for their first use; of a module
        its parameters, gradients and buffers."""
        if self._cuda:
            return
        if isinstance(tensors, torch.nn.Module):
            parameters = list(tensors.parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            tensors = [*parameters, *gradients, *tensors.buffers()]
        for tensor in tensors:
            for plain in _unwrapped(tensor):
                self._note(plain)

    def _note(self, tensor: torch.Tensor) -> None:
        # Sparse tensors have no storage; the ones of their indices and values come by themselves.
        if tensor.layout is torch.strided:
            self._note_storage(tensor.untyped_storage())

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage at its present size, whether it is known or not."""
        key = storage._cdata
        entry = self._storages.get(key)
        if entry is None:
            # A meta tensor has a size and no memory.
            if storage.device.type != self._device.type:
                return
            entry = _Live(storage, self._forget)
            entry.key, entry.size = key, 0
            self._storages[key] = entry
        try:
            storage.data_ptr()
            size = storage.nbytes()
        except RuntimeError:
            # DeepSpeed leaves storages with a size and a null pointer, which torch refuses to give.
            size = 0
        if size != entry.size:
            self._live += size - entry.size
            entry.size = size
            self._peak = max(self._peak, self._live)

    def _forget(self, entry: _Live) -> None:
        self._live -= entry.size
        del self._storages[entry.key]

    def _recount(self) -> None:
        """Notices what was resized while nobody watched."""
        for entry in list(self._storages.values()):
            storage = entry()
            if storage is not None:
                self._note_storage(storage)


@contextlib.contextmanager
def _watched_resize(note: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Shows each storage that is resized to `note`. FSDP2 frees and allocates gathered parameters
    with `UntypedStorage.resize_`, which is no operator and so never reaches a dispatch mode."""
    inherited = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = inherited(storage, size)
        note(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        # The class has none of its own: it inherits torch._C.StorageBase's.
        del torch.UntypedStorage.resize_
