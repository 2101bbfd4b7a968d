"""Ports at which the programs of a test begin to listen some seconds after they were chosen."""

from __future__ import annotations

import itertools
import os
import random
import socket

from hybrid.launch.placement import PORTS

_OURS = range(10_000, PORTS.start)  # a run that chooses its port itself takes one of PORTS


def free_port() -> int:
    """One that nobody has, as `free_ports`."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """So many that nobody has, below those that Linux hands out.

    Any socket of another test that asks for no port in particular may be handed one of the latter
    before the programs of this test listen there. Tests that run beside this one, each in a worker
    of pytest-xdist, choose among others."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ours = _OURS[worker::workers]
    found = filter(_is_free, random.SystemRandom().sample(ours, len(ours)))
    return list(itertools.islice(found, number))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
