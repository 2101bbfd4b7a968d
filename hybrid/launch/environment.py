"""This module reads from the environment which launcher started this process. It needs no torch.

torchrun, accelerate, deepspeed and `hybrid` itself set RANK and WORLD_SIZE, which torch and the
engines read. Open MPI, MPICH and srun set variables of their own."""

import os
import re

_OMPI = "OMPI_COMM_WORLD_"
# Rank, world size, rank within the host, ranks of the host. The order matters: `srun torchrun`
# leaves SLURM's variables beside torch's. A batch script without srun has SLURM_PROCID, but no
# SLURM_STEP_NUM_TASKS.
VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": tuple(f"{_OMPI}{key}" for key in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
# These tell the launchers apart that all set RANK.
MARKS = {"ACCELERATE_MIXED_PRECISION": "accelerate launch", "CROSS_RANK": "deepspeed"}


def launcher_name() -> str | None:
    """Return the launcher that started this process, or None if none did."""
    kind = variables_of()
    if kind != "torchrun":
        return kind
    return next((known for mark, known in MARKS.items() if mark in os.environ), kind)


def variables_of() -> str | None:
    """Return the key of `VARIABLES` whose variables are set, or None if no launcher set any.

    The world size decides, since srun sets that in a job step alone. RANK without WORLD_SIZE counts
    too: it is a mistake that its author must be told of."""
    for kind, (rank, world_size, *_) in VARIABLES.items():
        if world_size in os.environ or (rank == "RANK" and rank in os.environ):
            return kind
    return None


def read_number(key: str) -> int | None:
    """Return the whole number in an environment variable, or None if it holds none."""
    text = os.environ.get(key, "")
    return int(text) if text.isascii() and text.isdigit() else None


def num_local_ranks() -> int | None:
    """Return the number of ranks on this host, or None if the launcher does not tell it."""
    kind = variables_of()
    if kind is None:
        return 1
    if kind == "srun":
        return num_srun_tasks()
    return read_number(VARIABLES[kind][3]) or read_number("LOCAL_SIZE")  # deepspeed sets the latter


def num_srun_tasks() -> int | None:
    """Return how many tasks srun started on this host, or None outside a SLURM job step.

    SLURM writes "2(x3),1" for two tasks on each of three hosts and one on the next."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    host = read_number("SLURM_NODEID")
    return counts[host] if host is not None and host < len(counts) else None
