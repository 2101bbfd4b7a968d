"""`hybrid doctor`: what this machine lacks for the toolkit's runs, and how to mend it.

Each check yields findings; none raises for what it finds. Under a launcher the ranks also look at
one another: what each host found, and how fast the links between them are. `hybrid doctor FILE...`
judges files that launchers are handed instead.
"""

from __future__ import annotations

import dataclasses
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..launchers import Ranks, adopt
from ..launchers import name as launcher_name
from ..records import dumps
from .devices import check_devices, torch_problem
from .finding import Finding
from .machine import check_machine
from .network import check_network
from .packages import check_packages
from .programs import check_launchers

CHECKS = (check_packages, check_devices, check_machine, check_network, check_launchers)
RANKS = "ranks"  # the last finding of a rank that met no others
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers")
Tell = Callable[[Finding], None]


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings; `links` is what was measured between ranks (`links.Link`). `ok`: nothing that
    is needed is missing."""

    host: str
    ok: bool
    findings: list[Finding]
    links: list[Any]


def run(self_test: bool, json_to: TextIO | None) -> int:
    """The command: prints each finding as it is made, on the first rank alone, or at the end one
    JSON object to `json_to`. Returns the exit status: 3 where something needed is missing."""
    first = adopt().rank == 0 if under_launcher() else True
    report = examine(self_test, _print if first and not json_to else None)
    if first and json_to:
        print(dumps(report), file=json_to)
    elif first:
        what = "nothing" if report.ok else "something"
        print(f"{what} that is needed is missing{'' if report.ok else ': see each error'}")
    elif report.findings[-1].name == RANKS:  # the first rank cannot know
        print(f"hybrid: {report.host}: {report.findings[-1].found}", file=sys.stderr)
    return 0 if report.ok else 3


def judge_files(files: Sequence[Path], json_to: TextIO | None) -> int:
    """The command with files: judges what is handed to launchers in place of the machine. JobError
    for the first that is malformed; traps in the others are warnings, which leave the status 0."""
    from .files import judge

    findings = []
    for finding in judge(files):
        findings.append(finding)
        if json_to is None:
            _print(finding)
    if json_to:
        print(dumps(Report(socket.gethostname(), True, findings, [])), file=json_to)
    return 0


def examine(self_test: bool = True, tell: Tell | None = None) -> Report:
    """Look at this machine; `tell` gets each finding as it is made.

    Under a launcher the links are measured in place of a self-test, which starts ranks of its own;
    all ranks must call it then, and the first one's report has everything.
    """
    findings: list[Finding] = []
    links: list[Any] = []

    def add(finding: Finding) -> None:
        findings.append(finding)
        if tell:
            tell(finding)

    for check in CHECKS:
        for finding in check():
            add(finding)
    if under_launcher():
        for finding in _meet(findings, links):
            add(finding)
    elif self_test:
        from .self_test import check_strategies

        for finding in check_strategies():
            add(finding)
    ok = all(finding.status != "error" for finding in findings)
    return Report(socket.gethostname(), ok, findings, links)


def under_launcher() -> bool:
    """Whether a launcher started this process as a rank."""
    return launcher_name() is not None


def _meet(findings: Sequence[Finding], links: list[Any]) -> list[Finding]:
    """What the ranks learn from one another: other hosts' troubles, and the links. Collective."""
    if torch_problem():
        return [Finding(RANKS, "error", "they cannot meet without torch", "see torch above")]
    from .. import processes
    from .links import measure

    ranks = Ranks.from_env()
    try:
        processes.join(ranks)
        mine = (socket.gethostname(), ranks.local_rank, list(findings))
        elsewhere = troubles_elsewhere(processes.gather_objects(mine))
        measured, found = measure()
    except RuntimeError as error:  # all of torch's are (DistBackendError, DistStoreError, ...)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "see MASTER_ADDR, the network above, and that every host runs the same command"
        return [Finding(RANKS, "error", f"they did not meet: {reason}", mend)]
    finally:
        processes.cleanup()
    links += found
    return [*elsewhere, *measured]


def troubles_elsewhere(of_ranks: Sequence[tuple[str, int, list[Finding]]]) -> list[Finding]:
    """What is not well on other hosts than the first rank's, and releases that differ from its;
    each rank gives its host, its number there and its findings."""
    here, _, own = of_ranks[0]
    known = {finding.name: finding for finding in own}
    found = []
    for host, local_rank, findings in of_ranks:
        if local_rank or host == here:
            continue
        for finding in findings:
            if finding.status != "ok":
                words = f"on {host}: {finding.found}"
                found.append(dataclasses.replace(finding, found=words))
            elif finding.name in PACKAGES and finding.found != known[finding.name].found:
                words = f"on {host}: {finding.found}, on {here}: {known[finding.name].found}"
                mend = "install the same release on every host"
                found.append(Finding(finding.name, "warning", words, mend))
    return found


def _print(finding: Finding) -> None:
    """A line, and one below it on how to mend it."""
    print(f"{finding.status:8} {finding.name:20} {finding.found}", flush=True)
    if finding.mend:
        print(f"{'':8} {'':20} -> {finding.mend}", flush=True)
