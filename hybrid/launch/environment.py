"""This module reads from the environment which launcher started this process. It needs no torch.

torchrun, accelerate, deepspeed and `hybrid` itself set RANK and WORLD_SIZE, which torch and the
engines read. Open MPI, MPICH and srun set variables of their own. A process can also be inside an
allocation or below a launcher and be no rank of it: `without_launcher` keeps the variables of
these from ranks that it starts. `hybrid.launch.variable_check` refuses values that make no sense.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping

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
# MPICH's mpirun sets it for its ranks, also where it reaches the hosts by srun;
# `srun --mpi=pmi2` sets PMI_RANK and PMI_SIZE beside SLURM's own, and no local rank.
_HYDRA = "MPI_LOCALRANKID"
# Steps of SLURM from this number on are no ranks: the shell of salloc, a batch script (slurm.h,
# SLURM_MAX_NORMAL_STEP_ID).
_LAST_STEP = 0xFFFFFFF0
# What else launchers tell one process of a run, with VARIABLES and those of the meeting point.
_OF_ONE_RUN = {
    *("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"),
    *("OMPI_UNIVERSE_SIZE", "OMPI_APP_CTX_NUM_PROCS", "OMPI_FIRST_RANKS", "OMPI_NUM_APP_CTX"),
    *("OMPI_FILE_LOCATION", "OMPI_COMMAND", "OMPI_ARGV"),
}
_PREFIXES = ("TORCHELASTIC_", _OMPI, "OMPI_MCA_ess_", "OMPI_MCA_orte_", "OMPI_MCA_prte_", "PMI_",
             "PMIX_", "PRTE_", "HYDI_", "HYDRA_", "MV2_COMM_WORLD_", "ACCELERATE_", "FSDP_",
             "PARALLELISM_CONFIG_", "MEGATRON_LM_")  # fmt: skip
# These say which job of SLURM's it is, not which of its processes; user code names folders by them.
_OF_THE_JOB = {
    *("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_NAME", "SLURM_JOB_ACCOUNT", "SLURM_JOB_PARTITION"),
    *("SLURM_JOB_USER", "SLURM_JOB_UID", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"),
    *("SLURM_CONF", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT", "SLURM_TMPDIR"),
    *("SLURM_SUBMIT_DIR", "SLURM_SUBMIT_HOST"),
}
_OF_AN_ARRAY = "SLURM_ARRAY_"
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
    too: it is a mistake that its author must be told of. A shell in an allocation is no rank."""
    for kind, (rank, world_size, *_) in VARIABLES.items():
        if kind == "srun" and (_HYDRA in os.environ or is_in_a_shell_of_slurm()):
            continue
        if world_size in os.environ or (rank == "RANK" and rank in os.environ):
            return kind
    return None


def is_in_a_shell_of_slurm() -> bool:
    """Tell whether SLURM gave this process a shell of salloc or a script, and started no rank.

    SLURM_PTY_PORT does not tell that: srun hands it on from the shell to the ranks."""
    step = read_number("SLURM_STEP_ID")
    return step is not None and step >= _LAST_STEP


def without_launcher(
    environ: Mapping[str, str] = os.environ, keep_slurm: bool = False
) -> dict[str, str]:
    """Return the variables without what a launcher told one process of a run.

    Settings stay, such as those of NCCL, gloo, OpenMP, and the devices. keep_slurm: SLURM's stay,
    which srun needs inside an allocation; left out, those stay that name the job."""
    return {k: v for k, v in environ.items() if not _is_of_a_launcher(k, keep_slurm)}


@contextlib.contextmanager
def outside_launcher() -> Iterator[None]:
    """Have this process be no rank for a while, so that it can start ranks itself."""
    found = {key: os.environ[key] for key in os.environ.keys() - without_launcher()}
    for key in found:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(found)


def _is_of_a_launcher(key: str, keep_slurm: bool) -> bool:
    if key.startswith("SLURM_"):
        return not (keep_slurm or key in _OF_THE_JOB or key.startswith(_OF_AN_ARRAY))
    known = any(key in names for names in VARIABLES.values())
    return known or key in _OF_ONE_RUN or key.startswith(_PREFIXES)


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


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Restore the environment variables afterwards.

    A RANK left behind would tell a later command that a launcher started it, and with
    ACCELERATE_USE_DEEPSPEED left behind, Accelerate would use DeepSpeed in a later run."""
    found = dict(os.environ)
    try:
        yield
    finally:
        for key in os.environ.keys() - found:
            del os.environ[key]
        os.environ.update(found)
