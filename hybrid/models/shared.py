"""This module builds one whole copy of a model on a host, however many ranks train it there.

The first rank of a host makes the model and writes its tensors to a file. The others make only its
shape, on torch's meta device, and map the file into memory. A mapped tensor takes none of a rank's
own memory until it is written to, so what a stage or a shard does not keep is never copied.

The file is in the temporary folder and has no name there, so that nothing of it stays, whatever
ends a rank. The others open it by the first rank's descriptor, which Linux shows in /proc."""

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint.tensor_file import WIDTHS, Span, TensorFile
from ..checkpoint.tensors import blocks_of, dtype_of, parts_of
from ..job.errors import needs_room
from ..job.schema import Job
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from ..records.whole import naming
from . import build_model, can_be_made_on_meta
from .layers import Layers
from .losses import Loss

WHAT = "the tensors of the model, which the ranks of a host share"


def build_shared(job: Job, placement: Placement) -> tuple[Layers, Loss]:
    """Builds the model on every rank as `build_model` does; this is a collective call.

    A user's own function makes all values on each rank, since it may compute with them; with
    `model.on_meta` nobody makes any here."""
    if placement.world_size == 1 or job.model.on_meta or not can_be_made_on_meta(job):
        return build_model(job)
    built, place, host = None, "", placement.host_id
    with contextlib.ExitStack() as opened:
        if placement.local_rank == 0:
            built = build_model(job)
            file = write_nameless(built[0].tensors())
            opened.callback(os.close, file)
            place = f"/proc/{os.getpid()}/fd/{file}"
        places = [found for h, found in gather_objects([host, place]) if h == host and found]
        if built is None:
            built = _map(job, Path(places[0]))
        gather_objects(None)  # all have mapped the file
    return built


def write_nameless(tensors: Mapping[str, torch.Tensor]) -> int:
    """Write tensors, as safetensors lays them out, to a new file without a name.

    Returns its descriptor. Raises NoRoom, which names the temporary folder."""
    folder = Path(tempfile.gettempdir())
    with needs_room(folder), naming(folder / WHAT), tempfile.TemporaryFile() as file:
        for block in blocks_of(parts_of(tensors)):
            file.write(block)
        file.flush()
        return os.dup(file.fileno())


def _map(job: Job, path: Path) -> tuple[Layers, Loss]:
    """Builds the model around a file's tensors, or with values where its family needs them."""
    from .hf.probe import NotOnMeta

    try:
        path.stat()
        with torch.device("meta"):
            built = build_model(job)
    except NotOnMeta:
        return build_model(job)
    except OSError as error:  # such as of ranks in user namespaces of their own
        reason = f"{path} cannot be opened: {error.strerror}"
        print(f"hybrid: this rank makes a copy of the model: {reason}", file=sys.stderr)
        return build_model(job)
    _fill(built[0], path)
    return built


def _open(path: Path) -> dict[str, torch.Tensor]:
    """Maps each tensor of a file by itself, so that one which is dropped is no longer mapped.

    `safetensors` maps the file as one storage, all of which stays while any tensor does."""
    file = TensorFile(path)
    try:
        return {name: _map_span(path, span) for name, span in file.spans.items()}
    finally:
        file.close()


def _map_span(path: Path, span: Span) -> torch.Tensor:
    if not span.size:
        return torch.empty(span.shape, dtype=dtype_of(span.dtype))
    room = _map_bytes(path, span.begin, span.size * WIDTHS[span.dtype])
    return torch.frombuffer(room, dtype=dtype_of(span.dtype)).view(span.shape)


def _map_bytes(path: Path, begin: int, size: int) -> "ctypes.Array[ctypes.c_char]":
    """Maps bytes of a file; writes go to a copy of a page. Raises OSError.

    Python's `mmap` keeps a descriptor for each map (before 3.13: `trackfd`), of which a process may
    have fewer than a model has tensors."""
    skipped = begin % mmap.ALLOCATIONGRANULARITY
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t)
    libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64
    with path.open("rb") as file:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        start = begin - skipped
        place = libc.mmap(None, size + skipped, access, mmap.MAP_PRIVATE, file.fileno(), start)
    if place == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    room = (ctypes.c_char * size).from_address(place + skipped)
    weakref.finalize(room, libc.munmap, place, size + skipped).atexit = False
    return room


def _fill(layers: Layers, path: Path) -> None:
    """Gives meta tensors the values in a file; each keeps its identity, so that ties hold."""
    values = _open(path)
    for name, tensor in layers.tensors().items():
        value = values.pop(name)
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        else:
            value = value.clone()  # it outlives the parameters and would keep all mapped
        torch.utils.swap_tensors(tensor, value)
    if values:
        raise RuntimeError(f"{path.name} has tensors that the model has not: {sorted(values)}")
