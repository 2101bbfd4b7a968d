"""Defines the file that `hybrid doctor --self-test --out FILE` writes, and validates one.

Someone with a cluster can send it: it says which strategies ran there and computed what `single`
does, how fast the links are, and with which packages. It has no names of hosts, but `host0`, ...,
and no command line. `benchmarks/clusters/` has the files that came. The module needs no torch."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .. import records
from ..job.errors import JobError, first_line
from ..job.reading import show
from ..launch.serialization import sendable
from ..measure.machine import describe_machine
from ..strategies.registry import NAMES
from .finding import Finding, Link

SCHEMA: Literal["hybrid-evidence-1"] = "hybrid-evidence-1"
MACHINE = ("date", "system", "processor", "cores", "python", "packages", "commit")


@dataclasses.dataclass(frozen=True)
class Tested:
    """Says what became of one strategy on `processes`, and how far it was from `single`.

    The differences are the greatest relative ones, of losses and of final weights."""

    name: str
    status: Literal["equal", "not_equal", "not_possible", "failed"]
    processes: int
    device: Literal["cpu", "cuda"]
    seconds: float
    reason: str | None = None
    max_loss_diff: float | None = None
    max_weight_diff: float | None = None


@sendable
@dataclasses.dataclass(frozen=True)
class Host:
    """Describes one host: its ranks, the names of its GPUs, its cores and its packages."""

    name: str
    ranks: list[int]
    gpus: list[str]
    machine: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Holds what a self-test found on all hosts; `findings` are what was not in order."""

    schema: Literal["hybrid-evidence-1"]
    ok: bool
    launcher: str | None
    world_size: int
    hosts: list[Host]
    tested: list[Tested]
    links: list[Link]
    findings: list[Finding]


def describe_host(host: str, rank: int, gpus: list[str]) -> Host:
    """Describe this process's host, as one rank there sees it."""
    machine = describe_machine()
    return Host(host, [rank], gpus, {key: machine[key] for key in MACHINE})


def merge_hosts(of_ranks: Sequence[tuple[str, Host]]) -> list[Host]:
    """Return each host once, with all its ranks; each rank gives its host's id and its view."""
    found: dict[str, Host] = {}
    for key, own in of_ranks:
        known = found.get(key)
        if known is None:
            found[key] = own
            continue
        # Ranks to which a scheduler shows one GPU each see others than their peers.
        gpus = known.gpus + (own.gpus if len(own.gpus) == 1 else [])
        found[key] = dataclasses.replace(known, ranks=[*known.ranks, *own.ranks], gpus=gpus)
    return list(found.values())


def make_evidence(
    launcher: str | None,
    hosts: Sequence[Host],
    tested: Sequence[Tested],
    links: Sequence[Link],
    findings: Sequence[Finding],
) -> Evidence:
    """Put the evidence together, with other names for hosts."""
    ok = all(finding.status != "error" for finding in findings)
    # Where programs lie on the sender's disk is nobody else's business.
    bad = [one for one in findings if one.status != "ok"]
    rest = [one for one in bad if not one.name.startswith("launcher ")]
    size = sum(len(host.ranks) for host in hosts)
    made = Evidence(SCHEMA, ok, launcher, size, [*hosts], [*tested], [*links], rest)
    names = dict.fromkeys(host.name for host in hosts)
    text = records.dumps(made)
    for number, name in enumerate(names):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", f"host{number}", text)
    return records.from_dict(Evidence, json.loads(text))


def check_evidence(path: Path) -> Evidence:
    """Return the evidence in a file; raises JobError, in one line, where it is not valid."""
    try:
        data = records.load(path)
        found = records.from_dict(Evidence, data)
    except OSError as error:
        raise JobError(f"--check {path}: {error.strerror}") from None
    except ValueError as error:
        raise JobError(f"--check {path}: {_in_one_line(error)}") from None
    for problem in (*_unlike(data, json.loads(records.dumps(found)), ""), *_problems(found)):
        raise JobError(f"--check {path}: {problem}")
    return found


def _in_one_line(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return f"is no JSON: {first_line(error)}"
    one = errors()[0]
    where = ".".join(map(str, one["loc"]))
    given = "" if one["type"] == "missing" else f" = {show(one['input'])}"
    return f"{where}{given}: {one['msg']}"


def _unlike(data: Any, kept: Any, where: str) -> Iterator[str]:
    """Yield each place where a file has what its schema has not, or another type."""
    if isinstance(data, Mapping) and isinstance(kept, Mapping):
        for key in data:
            name = f"{where}.{key}".removeprefix(".")
            if key not in kept:
                yield f"{name} = {show(data[key])}: unknown; valid: {', '.join(kept)}"
            else:
                yield from _unlike(data[key], kept[key], name)
    elif isinstance(data, list) and isinstance(kept, list):
        for number, (one, other) in enumerate(zip(data, kept, strict=True)):
            yield from _unlike(one, other, f"{where}.{number}")
    elif data != kept or isinstance(data, bool) != isinstance(kept, bool):
        yield f"{where} = {show(data)}: valid: {show(kept)}"


def _problems(found: Evidence) -> Iterator[str]:
    """Yield what contradicts itself in a file whose values have the right types."""
    ranks = sorted(rank for host in found.hosts for rank in host.ranks)
    if ranks != list(range(found.world_size)):
        yield f"hosts: their ranks are {show(ranks)}; valid: 0 to {found.world_size - 1}, each once"
    missing = [name for name in NAMES if name not in {one.name for one in found.tested}]
    if missing:
        yield f"tested: lacks {', '.join(missing)}; valid: all strategies, as --self-test writes"
    twice = Counter((one.name, one.processes, one.device) for one in found.tested)
    for (name, *_), times in twice.items():
        if times > 1:
            yield f"tested: has {name} {times} times; valid: once on so many processes"
    for one in found.tested:
        yield from _problems_of(one)
    for link in found.links:
        if not all(0 <= rank < found.world_size for rank in link.ranks):
            yield f"links: ranks = {list(link.ranks)}: valid: 0 to {found.world_size - 1}"
        if not (link.latency_s > 0 and link.bytes_per_s > 0):
            yield f"links: of ranks {list(link.ranks)}: valid: a time and a rate above 0"
    bad = [one.name for one in found.tested if one.status in ("not_equal", "failed")]
    errors = [one.name for one in found.findings if one.status == "error"]
    if found.ok != (not bad and not errors):
        yield f"ok = {show(found.ok)}: contradicts {', '.join(bad + errors) or 'no error in it'}"


def _problems_of(one: Tested) -> Iterator[str]:
    ran = one.status in ("equal", "not_equal")
    if one.seconds < 0 or one.processes < ran:
        yield f"tested: {one.name}: valid: a time of 0 or more, and a process if it ran"
    if one.status == "equal" and one.name != "single" and one.max_loss_diff is None:
        yield f"tested: {one.name}: is equal without a max_loss_diff; valid: a number"
    if not ran and not one.reason:
        yield f"tested: {one.name}: {one.status} without a reason; valid: a text"
