"""The communication layer: joins this process to the others of its run, and leaves again.

`init_process(rank, world_size)` and `cleanup()` around what a run does; in between, `gather_rows`
is how ranks tell one another numbers. Ranks come from the launcher (`Ranks.from_env`).
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .layout import Ranks

COLLECTIVE_TIMEOUT = timedelta(seconds=300)  # gloo's own is half an hour


def device() -> torch.device:
    """This rank's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", Ranks.from_env().local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def init_process(rank: int, world_size: int) -> None:
    """Join the run's default process group: nccl on GPUs, gloo on CPUs. MASTER_ADDR and MASTER_PORT
    name the meeting point; a process alone needs neither."""
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0")
    if world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ.setdefault("MASTER_PORT", "0")
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group(
        "nccl" if here.type == "cuda" else "gloo",
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=here if here.type == "cuda" else None,
    )


def join(ranks: Ranks) -> None:
    """`init_process`, unless this process is in a group already."""
    if not dist.is_initialized():
        init_process(ranks.rank, ranks.world_size)


@contextmanager
def environment_kept() -> Iterator[None]:
    """Leave the environment as it was found. Left behind, RANK would tell a later command that a
    launcher started it, and ACCELERATE_USE_DEEPSPEED a later run that it is one of DeepSpeed's."""
    found = dict(os.environ)
    try:
        yield
    finally:
        for key in os.environ.keys() - found:
            del os.environ[key]
        os.environ.update(found)


def cleanup() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        deepspeed = sys.modules.get("deepspeed.comm")
        if deepspeed and deepspeed.is_initialized():
            deepspeed.destroy_process_group()  # and all groups of it that DeepSpeed remembers
        else:
            dist.destroy_process_group()


def gather_rows(row: Sequence[int | float]) -> list[list[int | float]]:
    """`row` of every rank, in rank order, in one collective. Numbers keep their 64 bits: floats as
    IEEE doubles, integers modulo 2**64 as signed."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [list(row)]
    mine = torch.tensor([_to_word(x) for x in row], dtype=torch.int64, device=device())
    table = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(table, mine)
    rows = torch.stack(table).tolist()
    return [[_from_word(w, like) for w, like in zip(r, row, strict=True)] for r in rows]


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; for small things outside the timed steps."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _to_word(x: int | float) -> int:
    if isinstance(x, float):
        return struct.unpack("<q", struct.pack("<d", x))[0]
    return (x + 2**63) % 2**64 - 2**63


def _from_word(word: int, like: int | float) -> int | float:
    if isinstance(like, float):
        return struct.unpack("<d", struct.pack("<q", word))[0]
    return word
