"""Reads from the environment which launcher started this process. No torch.

torchrun, accelerate, deepspeed and `hybrid` itself set RANK and WORLD_SIZE, which torch and the
engines read. Open MPI, MPICH and srun set variables of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# Rank, world size, rank within the host, ranks of the host. The order matters: `srun torchrun`
# leaves SLURM's variables beside torch's. A batch script without srun has SLURM_PROCID, but no
# SLURM_STEP_NUM_TASKS.
VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
# Tells those launchers apart that all set RANK.
MARKS = {"ACCELERATE_MIXED_PRECISION": "accelerate launch", "CROSS_RANK": "deepspeed"}


def launcher_name(environ: Mapping[str, str] = os.environ) -> str | None:
    """The launcher that started this process; None where none did."""
    kind = variables_of(environ)
    if kind != "torchrun":
        return kind
    return next((known for mark, known in MARKS.items() if mark in environ), kind)


def variables_of(environ: Mapping[str, str] = os.environ) -> str | None:
    """The key of `VARIABLES` whose variables are set; None where no launcher set any."""
    return next((kind for kind, keys in VARIABLES.items() if _is_set(keys, environ)), None)


def _is_set(keys: tuple[str, ...], environ: Mapping[str, str]) -> bool:
    """srun's size alone shows a job step. RANK without WORLD_SIZE counts too: it is a mistake that
    its author must be told of."""
    return keys[1] in environ or (keys[0] == "RANK" and keys[0] in environ)


def read_number(key: str) -> int | None:
    """The whole number in an environment variable; None where there is none."""
    text = os.environ.get(key, "")
    return int(text) if text.isascii() and text.isdigit() else None


def num_local_ranks() -> int | None:
    """How many ranks this host has; None where no launcher says it."""
    kind = variables_of()
    if kind is None:
        return 1
    if kind == "srun":
        return num_srun_tasks()
    return read_number(VARIABLES[kind][3]) or read_number("LOCAL_SIZE")  # deepspeed sets the latter


def num_srun_tasks() -> int | None:
    """How many tasks srun started on this host; None outside a SLURM job step.

    SLURM writes "2(x3),1" for two tasks on each of three hosts and one on the next.
    """
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    host = read_number("SLURM_NODEID")
    return counts[host] if host is not None and host < len(counts) else None
