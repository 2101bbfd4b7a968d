"""This module lets one process play a rank of a run of any size: no other rank is there.

torch's fake process group takes every collective and sends nothing. It opens no socket."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch.distributed as dist

from .placement import OWN, Placement
from .process_group import cleanup, restored_environment

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class PlayedRank(Placement):
    """Places a process that plays one rank; all of it is on the CPU, whatever this host has."""

    @property
    def device(self) -> torch.device:
        """Return the CPU."""
        import torch

        return torch.device("cpu")


@contextlib.contextmanager
def played(rank: int, world_size: int) -> Iterator[PlayedRank]:
    """Play a rank: join a fake process group, and leave it afterwards."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    with restored_environment():
        os.environ.update({name: str(number) for name, number in place.items()})
        # No one listens there: Accelerate wants a rendezvous to be named.
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield PlayedRank(rank, world_size, 0, OWN)
        finally:
            cleanup()
            _clear_sharding_prop_cache()  # it names the groups of the mesh that is gone
