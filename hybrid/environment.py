"""What a figure must be quoted with: host, processor, versions, commit, command. No torch."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "numpy", "hybrid")


def describe() -> dict[str, Any]:
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


def summary() -> str:
    """What `describe` says, as a line for reports: processor, releases, commit."""
    machine = describe()
    releases = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    return (
        f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, "
        f"{releases}, commit {machine['commit']}"
    )


def num_cores(process: int = 0) -> int:
    """Processors that a process may use, but no more than the container has time for; 0 is this
    one."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(process))
    else:
        allowed = os.cpu_count() or 1
    quota = cgroup_cores(CGROUP_QUOTA)
    return min(allowed, max(1, int(quota))) if quota else allowed


def cgroup_cores(file: Path) -> float | None:
    """How many cores' time a container may use (cgroup v2); None where nothing limits it."""
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max": no limit
        return None


def cache_folder() -> Path:
    """Where the toolkit keeps what can be made again: hybrid in XDG_CACHE_HOME or in ~/.cache. A
    relative path there is ignored (https://specifications.freedesktop.org/basedir-spec)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "hybrid"


def package_version(name: str) -> str | None:
    """The installed release of a package; None where there is none. Imports nothing of it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
