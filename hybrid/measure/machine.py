"""Describes what a figure must be quoted with: date, host, processor, versions. No torch."""

import functools
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..launch.ops_cache import package_version
from ..launch.threads import num_cores

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "numpy", "hybrid")


def describe_machine() -> dict[str, Any]:
    """Describe this machine and this process, as `machine` and `environment` in the records."""
    return installation() | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "cores": num_cores(),
        "command": " ".join(sys.argv),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


@functools.cache
def installation() -> dict[str, Any]:
    """Describe what stays the same for this process and its forks, and takes programs to find."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the toolkit's commit, with a + if its files were changed; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None
