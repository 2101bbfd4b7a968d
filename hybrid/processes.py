"""The communication layer: joins this process to the others of its run, and leaves again.

`init_process(rank, world_size)` and `cleanup()` around what a run does; in between, `gather_rows`
is how ranks tell one another numbers. Ranks come from the launcher (`Ranks.from_env`).
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from . import launchers, threads
from .config import Launch
from .launchers import Ranks

DEFAULT_LIMITS = Launch()
_joined = ExitStack()  # what `cleanup` undoes
FAREWELL_S = 0.05
_THERE = "hybrid/there/"  # keys of the store: each rank's host, once it has come


class StartError(RuntimeError):
    """The ranks of a run did not meet."""


def device() -> torch.device:
    """This rank's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", Ranks.from_env().local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def init_process(rank: int, world_size: int, limits: Launch = DEFAULT_LIMITS) -> dist.Store:
    """Join the run's default process group: nccl on GPUs, gloo on CPUs. MASTER_ADDR and MASTER_PORT
    name the meeting point; a process alone needs neither. Returns the store where ranks met;
    StartError, which names those missing, after `limits.start_timeout_s`."""
    _joined.enter_context(environment_kept())
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    launchers.adopt()
    threads.share()
    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    store = _meet(rank, world_size, limits.start_timeout_s)
    timeout = timedelta(seconds=limits.collective_timeout_s)
    store.set_timeout(timeout)
    _set_default_timeouts(timeout, timeout)
    dist.init_process_group(
        "nccl" if here.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=here if here.type == "cuda" else None,
    )
    return store


def _set_default_timeouts(gloo: timedelta, nccl: timedelta | None) -> None:
    """Of groups that engines make: they ask for none, and would get torch's of half an hour."""
    dist.distributed_c10d.default_pg_timeout = gloo
    dist.distributed_c10d.default_pg_nccl_timeout = nccl


def _meet(rank: int, world_size: int, seconds: int) -> dist.TCPStore:
    """The store of the meeting point once all ranks have come to it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun holds the store itself.
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            world_size,
            is_master=holds,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,  # it would not say who is missing
            multi_tenant=True,
        )
    except dist.DistError as error:
        taken = f"rank 0 cannot listen on port {port}" if holds else f"within {seconds} s"
        reason = str(error).splitlines()[0]
        raise StartError(
            f"no meeting of ranks at MASTER_ADDR:MASTER_PORT = {address}:{port}, {taken}: {reason}"
        ) from None
    keys = [f"{_THERE}{other}" for other in range(world_size)]
    store.set(keys[rank], socket.gethostname())
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistError:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise StartError(
            f"ranks {', '.join(map(str, missing))} of {world_size} did not start within {seconds} s"
            " (launch.start_timeout_s)"
        ) from None
    return store


def join(ranks: Ranks, limits: Launch = DEFAULT_LIMITS) -> dist.Store | None:
    """`init_process`, unless this process is in a group already."""
    if dist.is_initialized():
        return None
    return init_process(ranks.rank, ranks.world_size, limits)


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
    """Leave the process group, if this process is in one. The environment is again as it was before
    joining."""
    try:
        if dist.is_initialized():
            _leave()
    finally:
        _joined.close()


def _leave() -> None:
    deepspeed = sys.modules.get("deepspeed.comm")
    if deepspeed and deepspeed.is_initialized():
        deepspeed.destroy_process_group()  # and all groups of it that DeepSpeed remembers
    else:
        dist.destroy_process_group()
    # A moment for gloo's threads to let go of the last collective's tensors, which takes the
    # interpreter: a group that an engine still refers to lives on, and once Python ends its threads
    # would abort the process (https://github.com/pytorch/pytorch/issues/190489).
    time.sleep(FAREWELL_S)
    constants = dist.constants
    _set_default_timeouts(constants.default_pg_timeout, constants.default_pg_nccl_timeout)


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
