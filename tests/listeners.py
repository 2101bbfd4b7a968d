"""What processes listen on, and a data set whose ranks refuse to unpickle what peers send."""

from __future__ import annotations

import ipaddress
import threading
from types import TracebackType
from typing import Any, NoReturn, Self

import psutil
import torch
from torch.distributed import distributed_c10d
from torch.utils.data import TensorDataset

LOOK_S = 0.1


def listeners(processes: list[psutil.Process]) -> dict[tuple[int, str, int], str]:
    """The TCP sockets on which processes listen: (process, address, port) and what listens."""
    found = {}
    for process in processes:
        try:
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found[process.pid, *one.laddr] = " ".join(process.cmdline())[:100]
        except psutil.Error:
            continue  # it has ended
    return found


def open_to_all(found: dict[tuple[int, str, int], str]) -> list[str]:
    """Those that another host could reach."""
    return [
        f"{address}:{port} of {pid}, {command}"
        for (pid, address, port), command in found.items()
        if not ipaddress.ip_address(address).is_loopback
    ]


class Watch:
    """Looks, until the end of the `with`, at what the processes below this one listen on."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, str, int], str] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(LOOK_S):
            self.found |= listeners([this, *this.children(recursive=True)])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()


def refuse_pickles() -> None:
    """Torch's collectives of objects fail in this process from now on."""

    def refuse(*_: Any) -> NoReturn:
        raise AssertionError("a pickle came over a socket")

    distributed_c10d._unpickler = refuse


def data(samples: int, features: int) -> tuple[TensorDataset, TensorDataset]:
    """Random samples; a rank that reads them unpickles nothing of what peers send."""
    refuse_pickles()
    draw = torch.Generator().manual_seed(0)

    def make() -> TensorDataset:
        targets = torch.randint(10, (samples,), generator=draw)
        return TensorDataset(torch.randn(samples, features, generator=draw), targets)

    return make(), make()
