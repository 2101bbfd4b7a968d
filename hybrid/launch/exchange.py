"""How ranks tell one another numbers and small objects, outside of an engine's own collectives."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Row = TypeVar("Row", bound=Sequence[int | float])


def gather_rows(row: Row) -> list[Row]:
    """`row` (a list or a NamedTuple) of every rank, in rank order, in one collective. Numbers keep
    their 64 bits: floats as IEEE doubles, integers modulo 2**64 as signed."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [row]
    mine = torch.tensor([_to_word(x) for x in row], dtype=torch.int64, device=_group_device())
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(table, mine)
    rows = torch.stack(table).tolist()
    make: Any = getattr(type(row), "_make", list)
    return [make(_from_word(w, like) for w, like in zip(r, row, strict=True)) for r in rows]


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; for small things outside the timed steps."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _group_device() -> torch.device:
    """Where the default group's collectives take their tensors: nccl takes none on a CPU."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _to_word(x: int | float) -> int:
    if isinstance(x, float):
        return struct.unpack("<q", struct.pack("<d", x))[0]
    return (x + 2**63) % 2**64 - 2**63


def _from_word(word: int, like: int | float) -> int | float:
    if isinstance(like, float):
        return struct.unpack("<d", struct.pack("<q", word))[0]
    return word
