"""Describes this machine in the line that each benchmark's report quotes."""

from __future__ import annotations

from hybrid.measure.machine import describe_machine


def summarise_machine() -> str:
    """Return `describe_machine` as one line: processor, cores, releases of packages, commit."""
    machine = describe_machine()
    releases = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    return (
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{releases}, commit {machine['commit']}"
    )
