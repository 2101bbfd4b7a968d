"""Measures latency and bandwidth between the ranks that a launcher started. It imports torch.

It measures one pair of ranks on each host, and one between every two hosts (each host and the next
where there are many), one after the other so that none slows another; then an all-reduce."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from .finding import Finding, Link

REPEATS = 20  # of a message of 8 bytes
FEW_HOSTS = 6  # up to which every two are measured
START_BYTES = 2**18
MOST_BYTES = 2**26
TARGET_S = 0.1  # the length of a message is chosen so that it travels this long
SLOW = 0.5  # of the median bandwidth of its kind


def measure(placement: Placement) -> tuple[list[Finding], list[Link]]:
    """Measure between the ranks of the process group; the result is the same on every one."""
    hosts, ids = zip(*gather_objects([placement.host, placement.host_id]), strict=True)
    if len(hosts) == 1:
        return [Finding("links", "ok", "one rank: nothing to measure")], []
    mine: list[Link] = []
    for first, second in pairs(ids):
        dist.barrier()
        if placement.rank in (first, second):
            mine += _measure_pair(placement, (first, second), (hosts[first], hosts[second]))
    links = [link for some in gather_objects(mine) for link in some]
    size = min(MOST_BYTES, int(min(link.bytes_per_s for link in links) * TARGET_S) // 8 * 8)
    tensors = [torch.zeros(max(1, n // 8), dtype=torch.float64) for n in (8, size)]
    short, long = (_median_s(dist.all_reduce, t.to(placement.device), 5) for t in tensors)
    found = f"8 bytes in {short * 1e3:.2g} ms, {size / 2**20:.3g} MiB in {long * 1e3:.3g} ms"
    all_reduce = Finding("all-reduce", "ok", f"over {len(hosts)} ranks: {found}")
    return [*check_links(links), all_reduce], links


def pairs(hosts: Sequence[str]) -> list[tuple[int, int]]:
    """Choose the ranks to measure between, from every rank's host."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    within = [(here[0], here[1]) for here in ranks.values() if len(here) > 1]
    first = [here[0] for here in ranks.values()]
    if len(first) <= FEW_HOSTS:
        return within + list(itertools.combinations(first, 2))
    return within + list(zip(first, first[1:] + first[:1], strict=True))


def _measure_pair(
    placement: Placement, ranks: tuple[int, int], hosts: tuple[str, str]
) -> list[Link]:
    """Measure between two ranks, on both of them; the first returns the result."""
    leads, device = placement.rank == ranks[0], placement.device
    peer = ranks[1] if leads else ranks[0]
    there, back = (dist.send, dist.recv) if leads else (dist.recv, dist.send)

    def one_way(size: int, repeats: int) -> float:
        message = torch.zeros(size, dtype=torch.uint8, device=device)
        return _median_s(lambda m: (there(m, peer), back(m, peer)), message, repeats) / 2

    latency, trial = one_way(8, REPEATS), one_way(START_BYTES, 2)
    size = min(MOST_BYTES, max(START_BYTES, int(TARGET_S * START_BYTES / trial)))
    agreed = torch.tensor(size, device=device)
    there(agreed, peer)
    size = int(agreed)
    seconds = one_way(size, 3)
    return [Link(ranks, hosts, latency, size / seconds)] if leads else []


def _median_s(run: Callable[[Any], Any], message: torch.Tensor, repeats: int) -> float:
    """Return the median seconds of a run, after one that makes connections and does not count."""
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        run(message)
        if message.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def check_links(links: Sequence[Link]) -> Iterator[Finding]:
    """Describe each link, and warn of one between hosts that is far slower than the others."""
    between = [link.bytes_per_s for link in links if len(set(link.hosts)) > 1]
    for link in links:
        title = f"link {link.ranks[0]}-{link.ranks[1]}"
        host, other = link.hosts
        places = f"both on {host}" if host == other else f"on {host} and {other}"
        found = f"{places}: {link.latency_s * 1e3:.2g} ms, {format_rate(link.bytes_per_s)}"
        if host != other and link.bytes_per_s < SLOW * statistics.median(between):
            mend = f"see the interface, cable and load of {host} and {other}"
            yield Finding(title, "warning", f"{found}: under half of the median", mend)
        else:
            yield Finding(title, "ok", found)


def format_rate(bytes_per_s: float) -> str:
    """Write a rate in bits, as links are sold: 94 Mbit/s, 9.4 Gbit/s."""
    mbit = bytes_per_s * 8 / 1e6
    return f"{mbit / 1e3:.3g} Gbit/s" if mbit >= 1e3 else f"{mbit:.3g} Mbit/s"
