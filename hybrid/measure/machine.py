"""What a figure must be quoted with: host, processor, versions, commit, command. No torch."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..launch.ops_cache import package_version
from ..launch.threads import num_cores

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "numpy", "hybrid")


def describe_machine() -> dict[str, Any]:
    """This machine and this process."""
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": num_cores(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def summarise_machine() -> str:
    """What `describe_machine` says, as a line for reports: processor, releases, commit."""
    machine = describe_machine()
    releases = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    return (
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{releases}, commit {machine['commit']}"
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The toolkit's commit, with a + where its files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None
