"""A stub of torch.cuda: what hosts with GPUs show of them, on a machine that has none.

It answers the questions by which ranks are placed, and notes what is asked of a device; it computes
nothing. What only a real GPU can show is not tested with it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from hybrid.launch import devices
from hybrid.launch.placement import Placement


class StubCuda:
    """The GPUs that this process sees, or one of several ranks played by threads."""

    def __init__(self, patch: pytest.MonkeyPatch, driver: Path, seen: Sequence[str] = ()) -> None:
        self._all, self._own = list(seen), threading.local()
        self.current: list[int] = []  # what `set_device` was given
        driver.touch()
        patch.setattr(devices, "DRIVERS", (driver,))
        own: dict[str, Callable[..., Any]] = {
            "is_available": lambda: bool(self.seen),
            "device_count": lambda: len(self.seen),
            "is_initialized": lambda: False,
            "get_device_properties": lambda index: SimpleNamespace(uuid=self.seen[index]),
            "get_device_name": lambda index=0: "stub of a GPU",
            "set_device": lambda device: self.current.append(torch.device(device).index),
            "current_device": lambda: self.current[-1],
        }
        for name, function in own.items():
            patch.setattr(torch.cuda, name, function)

    @property
    def seen(self) -> list[str]:
        """The identifiers of the GPUs that this thread's rank sees."""
        found: list[str] = getattr(self._own, "seen", self._all)
        return found

    @contextlib.contextmanager
    def sees(self, gpus: Sequence[str]) -> Iterator[None]:
        """Have this thread see these, as CUDA_VISIBLE_DEVICES would."""
        self._own.seen = list(gpus)
        try:
            yield
        finally:
            del self._own.seen


class Host(Placement):
    """A placement on a host of a name and a boot of its own, played by a thread."""

    names: ClassVar[dict[int, tuple[str, str]]] = {}

    @property
    def host(self) -> str:
        """The name of the played host."""
        return self.names[self.rank][0]

    @property
    def host_id(self) -> str:
        """The name and the boot of the played host."""
        return "/".join(self.names[self.rank])


def settle_all(
    cuda: StubCuda, placements: Sequence[Placement], seen: Sequence[Sequence[str]]
) -> list[Placement | Exception]:
    """Have ranks settle in threads which device each has; return its place or its error."""
    store = dist.HashStore()
    arrived = threading.Barrier(len(placements), timeout=20)
    results: list[Any] = [None] * len(placements)

    def play(rank: int) -> None:
        try:
            with cuda.sees(seen[rank]):
                devices.announce(store, placements[rank])
                arrived.wait()
                results[rank] = devices.settle(store, placements[rank])[0]
        except Exception as error:  # the test looks at it
            results[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(len(placements))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
