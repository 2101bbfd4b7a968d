"""This module refuses values of a launcher's variables that make no sense, before torch reads them.

It checks all that are set, whichever launcher started this process, since libraries read others
than ours. Each message is one line: the variable, its value, what is valid. It needs no torch."""

import ipaddress
import os
import re
from collections.abc import Iterator

from ..job.errors import JobError
from .environment import VARIABLES, is_in_a_shell_of_slurm, num_local_ranks, variables_of

MOST_RANKS = 2**17  # of a run; more than any cluster has
MOST_PORT = 2**16 - 1
MOST_NUMBER = 2**32 - 1  # of a job, a step, a restart
SHOWN = 60  # characters of a value that are shown
# A variable for a rank, and the one for how many there are of its kind.
PAIRS = (
    *((names[0], names[1]) for names in VARIABLES.values()),
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_SIZE"),
    ("LOCAL_RANK", "WORLD_SIZE"),
    ("GROUP_RANK", "GROUP_WORLD_SIZE"),
    ("ROLE_RANK", "ROLE_WORLD_SIZE"),
    ("CROSS_RANK", "CROSS_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_NODE_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_NODEID", "SLURM_STEP_NUM_NODES"),
)
# How many ranks there are on a host, and how many in all.
PARTS = (
    ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ("LOCAL_SIZE", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"),
    ("MPI_LOCALNRANKS", "PMI_SIZE"),
)
# One of these alone is a mistake. SLURM sets its rank in batch scripts too.
TOGETHER = [names[:2] for kind, names in VARIABLES.items() if kind != "srun"]
_RANKS = {rank for rank, _ in PAIRS} | {"NODE_RANK"}
_SIZES = {size for _, size in (*PAIRS, *PARTS)} | {
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    *("SLURM_CPUS_PER_TASK", "SLURM_NTASKS_PER_NODE", "OMPI_UNIVERSE_SIZE", "OMP_NUM_THREADS"),
}
_NUMBERS = {
    *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "SLURM_RESTART_COUNT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID"),
}
_MEETING = ("MASTER_ADDR", "MASTER_PORT")


def check_variables(lowest_port: int = 1, counts: bool = True) -> None:
    """Raise JobError for the first variable whose value makes no sense.

    lowest_port: 0 where a run of one rank, which meets nobody, may have set it itself. counts: of
    jobs and restarts, which a rank that `hybrid` started reads none of."""
    for problem in _problems(lowest_port, counts):
        raise JobError(problem)


def _problems(lowest_port: int, counts: bool) -> Iterator[str]:
    for key, low, high in _ranges(lowest_port, counts):
        value = os.environ.get(key)
        if value is not None and not _is_number(value, low, high):
            yield f"{_shown(key)}: valid: a whole number from {low} to {high}"
    yield from _missing()
    for rank, size in PAIRS:
        # A batch script's own rank is that of no step.
        if _has(rank, size) and int(os.environ[rank]) >= int(os.environ[size]):
            most = int(os.environ[size]) - 1
            yield f"{_shown(rank)}: valid with {_shown(size)}: a whole number from 0 to {most}"
    for part, size in PARTS:
        if _has(part, size) and int(os.environ[part]) > int(os.environ[size]):
            yield f"{_shown(part)}: valid: at most {_shown(size)}"
    if "MASTER_ADDR" in os.environ and not _is_address(os.environ["MASTER_ADDR"]):
        yield f"{_shown('MASTER_ADDR')}: valid: a host's name or address, without a port"


def _ranges(lowest_port: int, counts: bool) -> Iterator[tuple[str, int, int]]:
    """Yield each variable that holds a number, with the least and the greatest one."""
    yield "MASTER_PORT", lowest_port, MOST_PORT
    # What is asked for first is named first.
    order = [*dict.fromkeys(key for pair in PAIRS for key in pair)]
    for key in [*order, *sorted((_RANKS | _SIZES) - set(order))]:
        yield key, *((1, MOST_RANKS) if key in _SIZES else (0, MOST_RANKS - 1))
    counts = counts and variables_of() is not None  # a process that is no rank reads none
    for key in sorted(_NUMBERS if counts else ()):
        yield key, 0, MOST_NUMBER


def _missing() -> Iterator[str]:
    """Yield what is missing beside what is set."""
    for names in TOGETHER:
        found = [key for key in names if key in os.environ]
        if len(found) == 1:
            other = next(key for key in names if key not in found)
            yield f"{_shown(found[0])}: {other} is not set; valid: both, or none"
    rank, size, *_ = VARIABLES["srun"]
    if size in os.environ and rank not in os.environ and not is_in_a_shell_of_slurm():
        yield f"{_shown(size)}: {rank} is not set; valid: both, or none"
    kind = variables_of()
    found = [key for key in _MEETING if key in os.environ]
    # srun's ranks find out the one that is missing, and so do ranks that are all on this host.
    if kind not in (None, "srun") and len(found) == 1 and not _is_on_one_host(VARIABLES[kind][1]):
        other = next(key for key in _MEETING if key not in found)
        yield f"{_shown(found[0])}: {other} is not set; valid: both, or none"


def _is_on_one_host(size: str) -> bool:
    return os.environ[size] in ("1", str(num_local_ranks()))


def _has(*keys: str) -> bool:
    return all(key in os.environ for key in keys)


def _is_number(text: str, low: int, high: int) -> bool:
    """Tell whether a text is a number in a range; `int` would take " 1", "1_0" and other digits."""
    return bool(re.fullmatch(r"[0-9]{1,10}", text)) and low <= int(text) <= high


def _is_address(text: str) -> bool:
    if ":" in text:
        try:
            return bool(ipaddress.ip_address(text.partition("%")[0]))
        except ValueError:
            return False
    return bool(re.fullmatch(r"\w[\w.-]{0,252}", text))


def _shown(key: str) -> str:
    value = os.environ[key]
    more = " ..." if len(value) > SHOWN else ""
    return f"{key} = {value[:SHOWN]!r}{more}"
