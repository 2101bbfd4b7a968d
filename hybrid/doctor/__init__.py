"""Runs `hybrid doctor`: it says what this machine lacks for the toolkit's runs, and the remedy.

Each check yields findings and raises for none of them. Under a launcher the ranks also compare what
each host found, and measure the links between them. A self-test can leave a file that shows another
person what works here (`hybrid.doctor.evidence`)."""

import dataclasses
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..job.errors import Refused, first_line
from ..job.schema import Launch
from ..launch.environment import outside_launcher
from ..launch.placement import Placement, export_rank_variables, find_placement
from ..records import dumps, write
from .finding import Finding, count
from .installed import check_launchers, check_packages
from .machine import check_devices, check_machine, gpu_names, torch_problem
from .network import check_network

CHECKS = (check_packages, check_devices, check_machine, check_network, check_launchers)
PATIENCE_S = 300  # with ranks that have met, and measure links
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers")


@dataclasses.dataclass(frozen=True)
class Report:
    """Holds all findings, whether all that is needed is there, and the `links.Link`s measured."""

    host: str
    ok: bool
    findings: list[Finding]
    links: list[Any]


@dataclasses.dataclass
class _Results:
    """Takes what is found beside the findings: measured links, tested strategies, all hosts."""

    links: list[Any] = dataclasses.field(default_factory=list)
    tested: list[Any] = dataclasses.field(default_factory=list)
    hosts: list[Any] = dataclasses.field(default_factory=list)


def run(self_test: bool | None, json_to: TextIO | None, evidence_to: Path | None = None) -> int:
    """Look at this machine, and return the exit status: 3 where something needed is missing.

    The first rank alone prints each finding as it is made, or at the end one JSON object.
    self_test: left out, where no launcher started this. evidence_to: takes the evidence of one."""
    placement = find_placement()
    self_test = placement.launcher is None if self_test is None else self_test
    first, host = placement.rank == 0, placement.host
    if placement.launcher:
        export_rank_variables(placement)
    findings: list[Finding] = []
    results = _Results()
    found = _look(placement, self_test, findings, results)
    _collect(found, findings, show=first and not json_to)
    ok = all(finding.status != "error" for finding in findings)
    if first and json_to:
        print(dumps(Report(host, ok, findings, results.links)), file=json_to)
    elif first:
        what = "nothing" if ok else "something"
        print(f"{what} that is needed is missing{'' if ok else ': see each error'}")
    elif findings[-1].name == "ranks":  # this rank met no others, so the first cannot know
        print(f"hybrid: {host}: {findings[-1].found}", file=sys.stderr)
    if first and evidence_to:
        _write_evidence(evidence_to, placement, findings, results)
    return 0 if ok else 3


def _write_evidence(
    path: Path, placement: Placement, findings: list[Finding], results: _Results
) -> None:
    from .evidence import describe_host, make_evidence

    hosts = results.hosts or [describe_host(placement.host, 0, gpu_names())]
    write(make_evidence(placement.launcher, hosts, results.tested, results.links, findings), path)


def check_file(path: Path, json_to: TextIO | None) -> int:
    """Say what an evidence file shows; raises JobError where it is not valid."""
    from .evidence import check_evidence

    found = check_evidence(path)
    if json_to:
        print(dumps(found), file=json_to)
        return 0
    states = [one.status.replace("_", " ") for one in found.tested]
    told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    ranks, hosts = count(found.world_size, "rank"), count(len(found.hosts), "host")
    print(f"{path}: valid; {ranks} on {hosts}: {told}")
    return 0


def run_on_files(files: Sequence[Path], json_to: TextIO | None) -> int:
    """Check files that launchers are handed; a trap in one is a warning, and the status is 0.

    Raises JobError for the first file that is malformed."""
    from .files import check_files

    findings: list[Finding] = []
    _collect(check_files(files), findings, show=not json_to)
    if json_to:
        print(dumps(Report(socket.gethostname(), True, findings, [])), file=json_to)
    return 0


def _collect(found: Iterable[Finding], findings: list[Finding], show: bool) -> None:
    """Append each finding as it is made, and print it where `show` is set."""
    for finding in found:
        findings.append(finding)
        if show:
            print(f"{finding.status:8} {finding.name:20} {finding.found}", flush=True)
        if show and finding.mend:
            print(f"{'':8} {'':20} -> {finding.mend}", flush=True)


def _look(
    placement: Placement, self_test: bool, so_far: list[Finding], results: _Results
) -> Iterator[Finding]:
    """Yield all findings; `so_far` holds those that were yielded.

    Under a launcher the links are measured first, and a self-test has the launcher's ranks."""
    for check in CHECKS:
        yield from check()
    relay = None
    if placement.launcher:
        found, relay = _meet(placement, so_far, self_test and placement.world_size > 1, results)
        yield from found
        if found and found[0].name == "ranks":
            return
    if self_test and placement.rank == 0:
        from .self_test import check_strategies

        with outside_launcher():
            size = placement.world_size
            yield from check_strategies(tested=results.tested, relay=relay, world_size=size)
    elif relay:
        relay.serve()


def _meet(
    placement: Placement, mine: list[Finding], relays: bool, results: _Results
) -> tuple[list[Finding], Any]:
    """Compare hosts and measure links with the other ranks, which all have to call this.

    Returns the findings, one of them called `ranks` if they did not meet, and with `relays` this
    rank's `Relay`."""
    if torch_problem():
        why = "they cannot meet without torch"
        return [Finding("ranks", "error", why, "see torch above")], None
    from ..launch.exchange import gather_objects
    from ..launch.process_group import cleanup, join_process_group
    from .evidence import describe_host, merge_hosts
    from .links import measure
    from .relay import Relay

    try:
        placement = join_process_group(placement, Launch(setup_timeout_s=PATIENCE_S))
        of_ranks = gather_objects((placement.host, placement.local_rank, mine))
        host = describe_host(placement.host, placement.rank, gpu_names())
        results.hosts += merge_hosts(gather_objects((placement.host_id, host)))
        measured, links = measure(placement)
        relay = Relay.open(placement) if relays else None
    except Refused as error:  # ranks without a GPU of their own
        return [Finding("ranks", "error", str(error), "see the devices above")], None
    except RuntimeError as error:  # all of torch's are (DistBackendError, DistStoreError, ...)
        mend = "see MASTER_ADDR, the network above, and that every host runs the same command"
        return [Finding("ranks", "error", f"they did not meet: {first_line(error)}", mend)], None
    finally:
        cleanup()
    results.links += links
    return [*troubles_elsewhere(of_ranks), *measured], relay


def troubles_elsewhere(of_ranks: Sequence[tuple[str, int, list[Finding]]]) -> list[Finding]:
    """Return what is wrong on other hosts than the first rank's, and releases that differ from its.

    Each rank gives its host, its number there and its findings."""
    here, _, own = of_ranks[0]
    known = {finding.name: finding.found for finding in own}
    found = []
    for host, local_rank, findings in of_ranks:
        for finding in findings if local_rank == 0 and host != here else ():
            words = f"on {host}: {finding.found}"
            if finding.status != "ok":
                found.append(dataclasses.replace(finding, found=words))
            elif finding.name in PACKAGES and finding.found != known[finding.name]:
                words += f", on {here}: {known[finding.name]}"
                mend = "install the same release on every host"
                found.append(Finding(finding.name, "warning", words, mend))
    return found
