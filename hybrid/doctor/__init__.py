"""Runs `hybrid doctor`: it says what this machine lacks for the toolkit's runs, and the remedy.

Each check yields findings and raises for none of them. Under a launcher the ranks also compare what
each host found, and measure the links between them."""

import dataclasses
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..job.errors import first_line
from ..launch.placement import Placement, export_rank_variables, find_placement
from ..records import dumps
from .finding import Finding
from .installed import check_launchers, check_packages
from .machine import check_devices, check_machine, torch_problem
from .network import check_network

CHECKS = (check_packages, check_devices, check_machine, check_network, check_launchers)
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers")


@dataclasses.dataclass(frozen=True)
class Report:
    """Holds all findings, whether all that is needed is there, and the `links.Link`s measured."""

    host: str
    ok: bool
    findings: list[Finding]
    links: list[Any]


def run(self_test: bool, json_to: TextIO | None) -> int:
    """Look at this machine, and return the exit status: 3 where something needed is missing.

    The first rank alone prints each finding as it is made, or at the end one JSON object."""
    placement = find_placement()
    first, host = placement.rank == 0, placement.host
    if placement.launcher:
        export_rank_variables(placement)
    findings: list[Finding] = []
    links: list[Any] = []
    found = _look(placement, self_test, findings, links)
    _collect(found, findings, show=first and not json_to)
    ok = all(finding.status != "error" for finding in findings)
    if first and json_to:
        print(dumps(Report(host, ok, findings, links)), file=json_to)
    elif first:
        what = "nothing" if ok else "something"
        print(f"{what} that is needed is missing{'' if ok else ': see each error'}")
    elif findings[-1].name == "ranks":  # this rank met no others, so the first cannot know
        print(f"hybrid: {host}: {findings[-1].found}", file=sys.stderr)
    return 0 if ok else 3


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
    placement: Placement, self_test: bool, so_far: list[Finding], links: list[Any]
) -> Iterator[Finding]:
    """Yield all findings; `so_far` holds those that were yielded, `links` takes the measured ones.

    Under a launcher the links are measured in place of a self-test, which starts ranks of its own.
    """
    for check in CHECKS:
        yield from check()
    if placement.launcher:
        yield from _meet(placement, so_far, links)
    elif self_test:
        from .self_test import check_strategies

        yield from check_strategies()


def _meet(placement: Placement, mine: list[Finding], links: list[Any]) -> list[Finding]:
    """Compare hosts and measure links with the other ranks, which all have to call this."""
    if torch_problem():
        return [Finding("ranks", "error", "they cannot meet without torch", "see torch above")]
    from ..launch.exchange import gather_objects
    from ..launch.process_group import cleanup, join_process_group
    from .links import measure

    try:
        placement = join_process_group(placement)
        of_ranks = gather_objects((placement.host, placement.local_rank, mine))
        measured, found = measure(placement)
    except RuntimeError as error:  # all of torch's are (DistBackendError, DistStoreError, ...)
        mend = "see MASTER_ADDR, the network above, and that every host runs the same command"
        return [Finding("ranks", "error", f"they did not meet: {first_line(error)}", mend)]
    finally:
        cleanup()
    links += found
    return [*troubles_elsewhere(of_ranks), *measured]


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
