"""Latency and bandwidth between the ranks that a launcher started. Imports torch.

Measured is one pair of ranks on each host, and one between every two hosts (each host and the next
where there are many), one after the other so that none slows another; then an all-reduce over all.
"""

from __future__ import annotations

import dataclasses
import itertools
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from .. import processes
from ..launchers import Ranks
from .finding import Finding

REPEATS = 20  # of a message of 8 bytes
FEW_HOSTS = 6  # up to which every two are measured
START_BYTES = 2**18
MOST_BYTES = 2**26
TARGET_S = 0.1  # the length of a message is chosen so that it travels this long
SLOW = 0.5  # of the median bandwidth of its kind


@dataclasses.dataclass(frozen=True)
class Link:
    """From one rank to another, half of there and back: seconds for 8 bytes, and bytes a second for
    a message long enough to tell."""

    ranks: tuple[int, int]
    hosts: tuple[str, str]
    latency_s: float
    bytes_per_s: float


def measure() -> tuple[list[Finding], list[Link]]:
    """What was measured between this run's ranks, the same on every one; in the process group that
    there is."""
    hosts = processes.gather_objects(socket.gethostname())
    if len(hosts) == 1:
        return [Finding("links", "ok", "one rank: nothing to measure")], []
    mine: list[Link] = []
    for first, second in pairs(hosts):
        dist.barrier()
        if Ranks.from_env().rank in (first, second):
            mine += _measure_pair(first, second, (hosts[first], hosts[second]))
    links = [link for some in processes.gather_objects(mine) for link in some]
    size = int(min(link.bytes_per_s for link in links) * TARGET_S) // 8 * 8
    findings = [*judge(links), _measure_all_reduce(len(hosts), min(MOST_BYTES, size))]
    return findings, links


def pairs(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """Which ranks to measure between, from every rank's host."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    within = [(here[0], here[1]) for here in ranks.values() if len(here) > 1]
    first = [here[0] for here in ranks.values()]
    if len(first) <= FEW_HOSTS:
        return within + list(itertools.combinations(first, 2))
    return within + list(zip(first, first[1:] + first[:1], strict=True))


def _measure_pair(first: int, second: int, hosts: tuple[str, str]) -> list[Link]:
    """On both ranks; the first has the result."""
    here = Ranks.from_env().rank
    peer, leads = (second, True) if here == first else (first, False)
    latency = _one_way(peer, leads, 8, REPEATS)
    size = _agree(peer, leads, int(TARGET_S * START_BYTES / _one_way(peer, leads, START_BYTES, 2)))
    size = min(MOST_BYTES, max(START_BYTES, size))
    seconds = _one_way(peer, leads, size, 3)
    return [Link((first, second), hosts, latency, size / seconds)] if leads else []


def _one_way(peer: int, leads: bool, size: int, repeats: int) -> float:
    """Seconds that a message of `size` bytes takes: half of the median there and back."""
    message = torch.zeros(size, dtype=torch.uint8, device=processes.device())

    def there_and_back() -> None:
        for sends in (leads, not leads):
            if sends:
                dist.send(message, peer)
            else:
                dist.recv(message, peer)

    return _median_s(there_and_back, repeats) / 2


def _agree(peer: int, leads: bool, size: int) -> int:
    """The leading rank's number, on both."""
    message = torch.tensor([size], dtype=torch.int64, device=processes.device())
    if leads:
        dist.send(message, peer)
    else:
        dist.recv(message, peer)
    return int(message.item())


def _measure_all_reduce(num_ranks: int, size: int) -> Finding:
    """Over all ranks: 8 bytes, and as many as the slowest link takes for a tenth of a second."""
    seconds = []
    for length in (8, size):
        tensor = torch.zeros(max(1, length // 8), dtype=torch.float64, device=processes.device())
        seconds.append(_median_s(lambda t=tensor: dist.all_reduce(t), 5))  # type: ignore[misc]
    found = f"over {num_ranks} ranks: 8 bytes in {seconds[0] * 1e3:.2g} ms, "
    return Finding(
        "all-reduce", "ok", f"{found}{size / 2**20:.3g} MiB in {seconds[1] * 1e3:.3g} ms"
    )


def _median_s(run: Callable[[], None], repeats: int) -> float:
    """Seconds, after one unmeasured time in which connections are made."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run()
        if processes.device().type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def judge(links: Sequence[Link]) -> Iterator[Finding]:
    """A finding for each link; one between hosts that is far slower than others is no good."""
    between = [link.bytes_per_s for link in links if len(set(link.hosts)) > 1]
    for link in links:
        (a, b), (host, other) = link.ranks, link.hosts
        title = f"link {a}-{b}"
        places = f"both on {host}" if host == other else f"on {host} and {other}"
        speed = f"{link.latency_s * 1e3:.2g} ms, {format_rate(link.bytes_per_s)}"
        found = f"{places}: {speed}"
        slow = host != other and link.bytes_per_s < SLOW * statistics.median(between)
        if slow:
            mend = f"see the interface, cable and load of {host} and {other}"
            yield Finding(title, "warning", f"{found}: under half of the median", mend)
        else:
            yield Finding(title, "ok", found)


def format_rate(bytes_per_s: float) -> str:
    """As links are sold, in bits: 94 Mbit/s, 9.4 Gbit/s."""
    mbit = bytes_per_s * 8 / 1e6
    return f"{mbit / 1e3:.3g} Gbit/s" if mbit >= 1e3 else f"{mbit:.3g} Mbit/s"
