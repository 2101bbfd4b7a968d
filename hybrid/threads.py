"""How many threads a rank computes with, where OMP_NUM_THREADS does not say it. No torch.

Left to itself each rank takes every core, and ranks that share a host wait for one another: two on
two cores were 17 times slower. torchrun and accelerate set 1; deepspeed, mpirun and srun nothing.
"""

from __future__ import annotations

import os
import sys

from . import launchers
from .environment import num_cores

VARIABLE = "OMP_NUM_THREADS"


def share() -> None:
    """Take this rank's part of its host's cores, unless OMP_NUM_THREADS is set; rank 0 says so.
    Before torch and numpy are imported, if it can be: later only torch hears of it."""
    ranks = launchers.ranks_here() or 1
    if ranks == 1 or VARIABLE in os.environ:
        return
    threads = max(1, min(num_cores(), cores_of_all() // ranks))
    if torch := sys.modules.get("torch"):
        if (own := torch.get_num_threads()) <= threads:
            os.environ[VARIABLE] = str(own)  # Accelerate changes torch's where this is not set
            return
        torch.set_num_threads(threads)
    os.environ[VARIABLE] = str(threads)
    if launchers.Ranks.from_env().rank == 0:
        each = f"{threads} thread{'s' if threads > 1 else ''} for each of the {ranks} ranks"
        print(f"hybrid: {VARIABLE} is not set: {each} of this host", file=sys.stderr)


def cores_of_all() -> int:
    """Cores that the ranks of this host have together. A launcher may bind each to some of its own,
    so they are the launcher's; srun's is no process of the job, and says it in variables."""
    tasks = launchers.tasks_here()
    if tasks is None or "OMPI_COMM_WORLD_SIZE" in os.environ:  # Open MPI's daemons are srun's tasks
        return num_cores(os.getppid())
    per_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(per_task) * tasks if per_task.isdecimal() else num_cores()
