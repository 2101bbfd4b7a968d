"""This module sets how many threads a rank computes with, and how long they run at a time.

Without OMP_NUM_THREADS each rank uses every core, and ranks that share a host wait for one another:
two ranks on two cores were 17 times slower. torchrun and accelerate set 1; deepspeed, mpirun and
srun set nothing. The module needs no torch."""

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from .environment import num_local_ranks, num_srun_tasks
from .placement import Placement

VARIABLE = "OMP_NUM_THREADS"
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
SLICE_NS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # Linux's number of the system call


def set_num_threads(placement: Placement) -> None:
    """Give this rank its part of the host's cores, unless OMP_NUM_THREADS is set; rank 0 prints it.

    Call it before torch and numpy are imported where possible: later it can only change torch."""
    ranks = num_local_ranks() or 1
    if ranks == 1 or VARIABLE in os.environ:
        return
    threads = max(1, min(num_cores(), num_shared_cores() // ranks))
    if torch := sys.modules.get("torch"):
        if (own := torch.get_num_threads()) <= threads:
            os.environ[VARIABLE] = str(own)  # Accelerate changes torch's where this is not set
            return
        torch.set_num_threads(threads)
    os.environ[VARIABLE] = str(threads)
    if placement.rank == 0:
        each = f"{threads} thread{'s' if threads > 1 else ''} for each of the {ranks} ranks"
        print(f"hybrid: {VARIABLE} is not set: {each} of this host", file=sys.stderr)


def num_shared_cores() -> int:
    """Count the cores that the ranks of this host have together.

    A launcher may bind each rank to some of its own cores, so the launcher's are counted. srun does
    not run on this host, but it sets environment variables."""
    tasks = num_srun_tasks()
    if tasks is None or "OMPI_COMM_WORLD_SIZE" in os.environ:  # Open MPI's daemons are srun's tasks
        return num_cores(os.getppid())
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(per_task) * tasks if per_task.isdecimal() else num_cores()


def num_cores(process: int = 0) -> int:
    """Count the processors that a process (0: this one) may use, within its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(process))
    else:
        allowed = os.cpu_count() or 1
    quota = cgroup_cores(CGROUP_QUOTA)
    return min(allowed, max(1, int(quota))) if quota else allowed


def cgroup_cores(file: Path) -> float | None:
    """Return how many cores' time a container may use (cgroup v2), or None without a limit."""
    try:
        quota, period = file.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max" means no limit
        return None


@contextlib.contextmanager
def short_time_slices() -> Iterator[None]:
    """Have this thread, and those that begin in the context, run for 0.1 ms while others wait.

    gloo's thread asks again and again for a lock whose holder has lost its core to it, for as long
    as it may run: 2.8 ms where Linux is told nothing. Linux has taken other lengths since 6.12
    (sched_setattr(2)). Older ones go on as before, and so does a thread with another policy."""
    _set_time_slice(SLICE_NS)
    try:
        yield
    finally:
        _set_time_slice(0)


def _set_time_slice(nanoseconds: int) -> None:
    """Set how long this thread runs while others wait; 0: as Linux has it."""
    number = SCHED_SETATTR.get(os.uname().machine)
    if sys.platform != "linux" or number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    # Size, policy, flags, nice, priority, runtime, deadline, period. It is refused at worst.
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    ctypes.CDLL(None).syscall(number, 0, attributes, 0)
