"""Measures the peak memory of one rank's tensors, exactly enough to check it by a formula.

    meter = StorageMeter("cpu")
    with meter:                 # before the model exists: DDP's buckets would be missed later
        engine = build(...)
        engine.train_step(...)
    meter.peak_bytes, meter.live_bytes, meter.how

Resident memory is of no use here, because hundreds of megabytes of it are libraries. On a CPU a
dispatch mode sees the tensors of each operator and counts each storage once, and a weak reference
tells when a storage is freed. That costs some microseconds for each operator, so use the meter in
steps that are not timed. It does not see what an operator allocates and frees inside itself. On a
CUDA device torch's allocator counts, at no cost."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type


class _Live(weakref.ref):
    """Refers weakly to a storage, and knows under which key and with how many bytes it counts."""

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
        # A DTensor, and a collective's result that is not there yet, wrap other tensors: let them
        # unwrap first; the operators on their inner tensors then come here.
        if types and any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        # Look at arguments too: a tensor that was made while the meter was not entered, or by no
        # operator, counts from its first use on.
        self._visit(args)
        self._visit(result)
        return result

    def _visit(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._note(value)
        elif isinstance(value, list | tuple):
            for item in value:
                self._visit(item)


class StorageMeter:
    """Counts the bytes of live tensor storages on one device, as a context manager.

    It notices frees at any time, and new storages while it is entered. It can be entered again, but
    a process can have only one meter entered at a time. Raises RuntimeError otherwise. On the meta
    device it counts what tensors without values would take, and those with values on the CPU."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._counted = {self._device.type, *(["cpu"] if self._device.type == "meta" else [])}
        self.how = "torch.cuda.max_memory_allocated" if self._cuda else "counted tensor storages"
        # By address: the weak reference's callback runs before an address can be used again.
        self._storages: dict[int, _Live] = {}
        # Other threads and callbacks change these without a lock: the interpreter switches threads
        # only at calls and jumps, and a plain `+=` has none.
        self._live = 0
        self._peak = self._before = 0
        self._was_entered = False
        self._exit: contextlib.ExitStack | None = None

    @property
    def live_bytes(self) -> int:
        """Return the bytes of the storages that are alive now."""
        return torch.cuda.memory_allocated(self._device) if self._cuda else self._live

    @property
    def peak_bytes(self) -> int:
        """Return the most bytes that were alive at one time since the first entry."""
        return max(self._before, self.peak_bytes_since_mark)

    @property
    def peak_bytes_since_mark(self) -> int:
        """Return the most bytes that were alive at one time since `mark`, or since the entry."""
        return torch.cuda.max_memory_allocated(self._device) if self._cuda else self._peak

    def mark(self) -> None:
        """Begin a new peak, `peak_bytes_since_mark`, beside the peak of the whole time."""
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
                torch.cuda.init()  # else torch knows no device yet whose peak to reset
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

    def _note(self, tensor: torch.Tensor) -> None:
        # A sparse tensor has no storage; those of its indices and values come here by themselves.
        if tensor.layout is torch.strided:
            self._note_storage(tensor.untyped_storage())

    def _note_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage at its present size, whether it is new or known."""
        key = storage._cdata
        entry = self._storages.get(key)
        if entry is None:
            # A meta tensor has a size and no memory: it counts where it is asked for alone.
            if storage.device.type not in self._counted:
                return
            entry = _Live(storage, self._forget)
            entry.key, entry.size = key, 0
            self._storages[key] = entry
        try:
            if storage.device.type != "meta":
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
        """Count what was resized while the meter was not entered."""
        for entry in list(self._storages.values()):
            storage = entry()
            if storage is not None:
                self._note_storage(storage)


@contextlib.contextmanager
def _watched_resize(note: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Show each storage that is resized to `note`.

    FSDP2 frees and allocates gathered parameters with `UntypedStorage.resize_`, which is not an
    operator and so never reaches a dispatch mode."""
    inherited = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = inherited(storage, size)
        note(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        # The class inherits this method from torch._C.StorageBase and has none of its own.
        del torch.UntypedStorage.resize_
