"""This module lets ranks exchange numbers and small objects outside an engine's own collectives.

Objects go as JSON (`hybrid.launch.serialization`): no rank unpickles what another one sends."""

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .serialization import dumps, loads

Row = TypeVar("Row", bound=Sequence[int | float])


def gather_rows(row: Row) -> list[Row]:
    """Return the `row` (a list or a NamedTuple) of every rank, in rank order, by one collective.

    Numbers keep their 64 bits: floats as IEEE doubles, integers modulo 2**64 as signed."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [row]
    form = "<" + "".join("d" if isinstance(x, float) else "q" for x in row)
    numbers = [x if isinstance(x, float) else (x + 2**63) % 2**64 - 2**63 for x in row]
    words = torch.frombuffer(bytearray(struct.pack(form, *numbers)), dtype=torch.int64)
    mine = words.to(group_device())
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(table, mine)
    make: Any = getattr(type(row), "_make", list)
    return [make(struct.unpack(form, r.tobytes())) for r in torch.stack(table).cpu().numpy()]


def gather_objects(value: Any) -> list[Any]:
    """Return the `value` of every rank, in rank order; for small things outside timed steps.

    Raises TypeError for what `hybrid.launch.serialization` cannot send."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]

    def all_gather(mine: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        return found

    return gather_by(all_gather, value, group_device())


def gather_by(
    all_gather: Callable[[torch.Tensor], list[torch.Tensor]], value: Any, device: torch.device
) -> list[Any]:
    """Return the `value` of every rank by two collectives: of the lengths, and of the bytes.

    all_gather: returns every rank's tensor, where all have the same shape and are on `device`."""
    mine = torch.frombuffer(bytearray(dumps(value)), dtype=torch.uint8)
    sizes = [int(size) for size in all_gather(torch.tensor([len(mine)], device=device))]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    parts = zip(all_gather(padded), sizes, strict=True)
    return [loads(part[:size].cpu().numpy().tobytes()) for part, size in parts]


def group_device() -> torch.device:
    """Return where the default group's collectives take tensors: nccl takes none on a CPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
