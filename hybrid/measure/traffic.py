"""Counts what one rank communicates: the collectives it calls and the bytes its sockets send.

    counter = CollectiveCounter()
    before = tcp_bytes_sent()
    counter.start()
    ...                                # some whole steps, under any strategy
    counter.stop()
    counter.counts()["all_reduce"]     # OpCount(calls=..., payload_bytes=..., sent_bytes=...)
    after = tcp_bytes_sent()           # minus `before`: what the sockets really sent

Every collective of torch ends in one operator `c10d::*`: those of Python, of DDP's C++ reducer, of
FSDP2 and DeepSpeed, a pipeline's send and receive, and functional collectives, which are what
`full_tensor()` uses. The counter gives each operator a kernel that counts and then calls the
original. Its dispatch key is `BackendSelect`, which every call passes on every device. Kernels on
the autograd keys would miss calls that are already below autograd: those under `inference_mode` and
those of functional collectives, of which FSDP2's gradient norm is one.
The counter does not see symmetric memory and communication outside of torch.distributed."""

import contextlib
import ctypes
import dataclasses
import os
import struct
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from ..launch.serialization import sendable


@sendable
@dataclasses.dataclass(frozen=True)
class OpCount:
    """Counts one kind of collective on this rank.

    payload_bytes: the whole tensors that were reduced, gathered, scattered or sent. sent_bytes: the
    part of them that this rank puts on the wire."""

    calls: int
    payload_bytes: int
    sent_bytes: float


class _Meaning(NamedTuple):
    """Says which argument of an operator holds its payload, or one rank's n-th (`of_one_rank`)."""

    name: str
    argument: int | None
    of_one_rank: bool = False


# The operators of c10d by the start of their names; the longest start that fits counts. The rest
# (`_`, `_base_`, `_coalesced_`, `_into_tensor_coalesced_`) changes how tensors are passed, not what
# is sent, and differs between releases, so `_operators` asks the running torch for all names.
_MEANINGS = {
    "allreduce": _Meaning("all_reduce", 0),
    "allgather": _Meaning("all_gather", 0),
    "reduce_scatter": _Meaning("reduce_scatter", 1),
    "alltoall": _Meaning("all_to_all", 1),
    "broadcast": _Meaning("broadcast", 0),
    "reduce": _Meaning("reduce", 0),
    "gather": _Meaning("gather", 1, of_one_rank=True),
    "scatter": _Meaning("scatter", 0, of_one_rank=True),
    "send": _Meaning("send", 0),
    "recv": _Meaning("recv", 0),
    "barrier": _Meaning("barrier", None),
    "monitored_barrier": _Meaning("barrier", None),
}


def sent_share(name: str, size: int, backend: str) -> float:
    """Return the part of a payload that one of `size` ranks sends, by the ring algorithms.

    In rooted collectives (broadcast, reduce, gather, scatter) ranks send unequally; the result is
    then the mean over the group. Source for the ring algorithms:
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
    gloo differs twice: its reduce_scatter is an all_reduce inside (pytorch issue 118911), and its
    reduce is a reduce-scatter and a gather (ranks send all of it, the root all but its own part).
    Both, and all others, agree with `tcp_bytes_sent` on 2 and 4 ranks."""
    others = (size - 1) / size
    if backend == "gloo" and name == "reduce_scatter":
        return 2 * others
    if backend == "gloo" and name == "reduce":
        return others * (size + 1) / size
    return {
        "all_reduce": 2 * others,
        "all_gather": others,
        "reduce_scatter": others,
        "all_to_all": others,
        "broadcast": others,
        "reduce": others,
        "gather": others / size,
        "scatter": others / size,
        "send": 1.0,
        "recv": 0.0,
        "barrier": 0.0,
    }[name]


def _operators() -> Iterator[tuple[Any, _Meaning | None]]:
    """Yield every communicating operator of the running torch with its meaning, None if unknown.
    An operator is unknown if a newer release of torch has added it."""
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, base = qualified.partition("::")
        if namespace != "c10d":
            continue
        operator = getattr(torch.ops.c10d, base).default
        if not any(argument.name == "process_group" for argument in operator._schema.arguments):
            continue  # such as `check_for_nan`, which sends nothing
        plain = base.strip("_")
        known = (start for start in _MEANINGS if plain.startswith(start))
        yield operator, _MEANINGS.get(max(known, key=len, default=""))


_uncounted = ContextVar("uncounted", default=False)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Leave this thread's collectives out of every count: they are no part of a step."""
    token = _uncounted.set(True)
    try:
        yield
    finally:
        _uncounted.reset(token)


class CollectiveCounter:
    """Counts this process's collectives between `start()` and `stop()`, over any number of windows.

    A collective takes some 15 us more while the counter is started, and nothing more while it is
    stopped. A process can have one counter started at a time: torch refuses a second one's kernels.
    While it starts and stops no other thread may call a collective of `torch.distributed`: torch's
    dispatcher takes no lock to read its kernels. See `hybrid.checkpoint.writer`."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = None
        self._counts: dict[tuple[str, int], OpCount] = {}  # by plain name and size of the group
        self._dtypes = defaultdict[str, Counter[str]](Counter)
        self._not_counted: set[str] = set()
        # On CUDA, autograd's own threads call collectives in the backward pass.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Put the counting kernels in place."""
        if self._library is not None:
            raise RuntimeError("this counter is already started")
        kernels = [(op._schema.name, self._kernel(op, meaning)) for op, meaning in _operators()]
        library = torch.library.Library("c10d", "IMPL")
        for name, kernel in kernels:
            library.impl(name, kernel, "BackendSelect", with_keyset=True, allow_override=False)
        self._library = library

    def stop(self) -> None:
        """Remove the kernels, so that torch calls its own ones directly."""
        if self._library is None:
            raise RuntimeError("this counter is not started")
        self._library._destroy()
        self._library = None

    def close(self) -> None:
        """Stop the counter if it is started."""
        if self._library is not None:
            self.stop()

    def counts(self) -> dict[str, OpCount]:
        """Return what all windows counted, by plain name (`all_reduce`, `send`, ...)."""
        found = dict[str, OpCount]()
        for (name, _), count in self.by_group().items():
            found[name] = _sum(found.get(name), count)
        return found

    def by_group(self) -> dict[tuple[str, int], OpCount]:
        """Return the same by plain name and by the number of ranks in the group."""
        with self._lock:
            return dict(self._counts)

    def payload_by_dtype(self) -> dict[str, dict[str, int]]:
        """Return the payload bytes of all windows by plain name and torch's name of the dtype."""
        with self._lock:
            return {name: dict(sizes) for name, sizes in self._dtypes.items()}

    def not_counted(self) -> list[str]:
        """Return the unknown operators that were called, whose bytes are in no count."""
        with self._lock:
            return sorted(self._not_counted)

    def _kernel(self, operator: Any, meaning: _Meaning | None) -> Callable[..., Any]:
        names = [argument.name for argument in operator._schema.arguments]
        group_at = names.index("process_group")
        below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

        def count_and_call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if _uncounted.get():
                pass
            elif meaning is None:
                with self._lock:
                    self._not_counted.add(operator._schema.name)
            else:
                self._add(meaning, args, args[group_at])
            return operator.redispatch(keyset & below, *args, **kwargs)

        return count_and_call

    def _add(self, meaning: _Meaning, args: tuple[Any, ...], boxed_group: Any) -> None:
        payload, sent, dtypes = 0, 0.0, Counter[str]()
        group = dist.ProcessGroup.unbox(boxed_group)
        size = group.size()
        if meaning.argument is not None:
            device = torch.device("cpu")
            for tensor in tree_leaves(args[meaning.argument]):  # a tensor, or lists of them
                # Not `nbytes`, which a sparse gradient does not have.
                dtype = str(tensor.dtype).removeprefix("torch.")
                dtypes[dtype] += tensor.numel() * tensor.element_size()
                # A tensor without values is on the meta device here, which no group knows.
                device = device if tensor.is_meta else tensor.device
            payload = dtypes.total() * (size if meaning.of_one_rank else 1)
            # By device, since one group can have gloo for the CPU and nccl for the GPU.
            backend = group._get_backend(device).name()
            sent = payload * sent_share(meaning.name, size, backend)
        with self._lock:
            self._dtypes[meaning.name].update(dtypes)
            key = meaning.name, size
            self._counts[key] = _sum(self._counts.get(key), OpCount(1, payload, sent))


def _sum(one: OpCount | None, other: OpCount) -> OpCount:
    if one is None:
        return other
    return OpCount(
        one.calls + other.calls,
        one.payload_bytes + other.payload_bytes,
        one.sent_bytes + other.sent_bytes,
    )


_IPPROTO_TCP = 6
_TCP_INFO = 11
# tcpi_notsent_bytes, tcpi_bytes_sent and tcpi_bytes_retrans in struct tcp_info of linux/tcp.h, the
# last since Linux 4.19.
_TCP_BYTES = struct.Struct("=144x I 52x QQ")


def tcp_bytes_sent() -> int | None:
    """Return the bytes that this process's open TCP sockets took to send; None: that is unknown.

    Use differences; the bytes of a socket that was closed in between are lost. Those that wait in a
    socket for the receiver count. Retransmitted bytes are left out: up to a tenth of a large
    message between processes of one busy host. It costs some 5 us for each file descriptor. NVLink,
    InfiniBand and shared memory do not show."""
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
        getsockopt = ctypes.CDLL(None).getsockopt
    except (OSError, AttributeError):
        return None
    by_inode: dict[int, int] = {}
    # This calls libc because a `socket.socket` around the descriptor would own it and, where a
    # default timeout is set, make it non-blocking for gloo too.
    info = ctypes.create_string_buffer(512)
    for descriptor in descriptors:
        length = ctypes.c_uint32(len(info))
        if getsockopt(descriptor, _IPPROTO_TCP, _TCP_INFO, info, ctypes.byref(length)) != 0:
            continue  # closed meanwhile, not a socket, or not TCP
        if length.value < _TCP_BYTES.size:
            return None
        waiting, sent, again = _TCP_BYTES.unpack_from(info)
        # A duplicated descriptor is the same socket.
        by_inode[os.fstat(descriptor).st_ino] = waiting + sent - again
    return sum(by_inode.values())
