"""Which launcher started this process, and as which rank. No torch.

torchrun, accelerate, deepspeed and `hybrid` itself say it in RANK and WORLD_SIZE, which torch and
the engines read. Open MPI, MPICH and srun have variables of their own: `adopt` sets torch's from
them, so that nothing else asks who the launcher is.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from .config import JobError

# Rank, world size, rank within the host, ranks of the host. In order: `srun torchrun` leaves
# SLURM's beside torch's. A batch script without srun has SLURM_PROCID too, but no step's size.
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
# What tells those apart that all set RANK.
MARKS = {
    "HYBRID_PARENT": "hybrid",
    "ACCELERATE_MIXED_PRECISION": "accelerate launch",
    "CROSS_RANK": "deepspeed",
}
_PROGRAMS = {
    "torchrun",
    "torch.distributed.run",
    "accelerate",
    "accelerate.commands.launch",
    "deepspeed",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "mpirun",
    "mpirun.openmpi",
    "mpirun.mpich",
    "mpiexec",
    "mpiexec.hydra",
}
_PDEATHSIG = 1  # PR_SET_PDEATHSIG, prctl(2)
PORTS = range(20000, 30000)  # below Linux's ephemeral ones (net.ipv4.ip_local_port_range)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which process of a run this is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls) -> Ranks:
        """What the launcher said; one process alone where there is none. JobError where what it
        said makes no sense."""
        kind = _kind(os.environ)
        if kind is None:
            return cls()
        rank, world, local, _ = (_number(key) for key in VARIABLES[kind])
        if world is None or rank is None or not rank < world:
            keys = " and ".join(f"{k} = {os.environ.get(k)!r}" for k in VARIABLES[kind][:2])
            raise JobError(f"{keys}: the launcher must set a rank below a world size")
        return cls(rank, world, rank if local is None else local)


def name(environ: Mapping[str, str] = os.environ) -> str | None:
    """The launcher that started this process; None where none did."""
    kind = _kind(environ)
    if kind != "torchrun":
        return kind
    return next((known for mark, known in MARKS.items() if mark in environ), kind)


def adopt() -> Ranks:
    """Set what torch, Accelerate and DeepSpeed read, where the launcher speaks otherwise; returns
    the ranks. JobError where ranks cannot know where to meet."""
    ranks, kind = Ranks.from_env(), _kind(os.environ)
    found = {
        "RANK": ranks.rank,
        "WORLD_SIZE": ranks.world_size,
        "LOCAL_RANK": ranks.local_rank,
        "LOCAL_WORLD_SIZE": ranks_here(),
    }
    for key, value in found.items():
        if value is not None:
            os.environ.setdefault(key, str(value))
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        address, port = ("localhost", 0) if kind is None else _meeting_point(kind, ranks)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
    return ranks


def ranks_here() -> int | None:
    """How many ranks this host has; None where nobody says."""
    kind = _kind(os.environ)
    if kind is None:
        return 1
    if kind == "srun":
        return tasks_here()
    return _number(VARIABLES[kind][3]) or _number("LOCAL_SIZE")  # deepspeed's word for it


def tasks_here() -> int | None:
    """How many tasks srun started on this host, from such as "2(x3),1": 2 on each of three hosts,
    1 on the next. None where there is no step of SLURM's."""
    counts: list[int] = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(found[1])] * int(found[2] or 1)
    host = _number("SLURM_NODEID")
    return counts[host] if host is not None and host < len(counts) else None


def _kind(environ: Mapping[str, str]) -> str | None:
    return next((kind for kind, keys in VARIABLES.items() if _said(keys, environ)), None)


def _said(keys: tuple[str, ...], environ: Mapping[str, str]) -> bool:
    """srun's size alone shows a step; half of RANK and WORLD_SIZE is a mistake to be told of."""
    return keys[1] in environ or (keys[0] == "RANK" and keys[0] in environ)


def _number(key: str) -> int | None:
    text = os.environ.get(key, "")
    return int(text) if text.isascii() and text.isdigit() else None


def _meeting_point(kind: str, ranks: Ranks) -> tuple[str, int]:
    """Address and port of rank 0, the same on every rank without asking one another."""
    if ranks.world_size == 1:
        return "localhost", 0
    if kind == "srun":
        job, step = _number("SLURM_JOB_ID") or 0, _number("SLURM_STEP_ID") or 0
        return _first_node(), PORTS[(1009 * job + step) % len(PORTS)]
    if ranks_here() == ranks.world_size:
        return "localhost", PORTS[os.getppid() % len(PORTS)]  # all ranks of a host have one parent
    how = "-x MASTER_ADDR=... -x MASTER_PORT=..." if kind == "Open MPI" else "-genv NAME VALUE"
    raise JobError(
        "MASTER_ADDR and MASTER_PORT are not set, and ranks on several hosts need to be told where "
        f"rank 0 is: start {kind} with {how}"
    )


def _first_node() -> str:
    """The host of rank 0 of this SLURM step; JobError where it cannot be found out."""
    if _number("SLURM_STEP_NUM_NODES") == 1:
        return "localhost"
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    try:
        first = _scontrol("show", "hostnames", nodes).split()[0]
        try:
            socket.getaddrinfo(first, None)
        except OSError:  # a node whose name is not its host's; SLURM knows the address
            words = _scontrol("--oneliner", "show", "node", first).split()
            first = dict(word.split("=", 1) for word in words if "=" in word)["NodeAddr"]
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        raise JobError(
            f"MASTER_ADDR is not set, and the first node of {nodes!r} cannot be found out "
            f"({type(error).__name__}): export MASTER_ADDR and MASTER_PORT"
        ) from None
    return first


def _scontrol(*words: str) -> str:
    return subprocess.run(
        ["scontrol", *words], capture_output=True, text=True, timeout=30, check=True
    ).stdout


def end_with_launcher() -> None:
    """Have this rank end when the launcher that started it is gone, which can no longer do it
    (Linux; nothing elsewhere). The kernel ends it with its parent; where the launcher stands
    further up (deepspeed's and accelerate's start others), a thread looks."""
    if sys.platform != "linux" or name() is None:
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get("HYBRID_PARENT")
    if os.getppid() != parent or expected not in (None, str(parent)):
        os._exit(1)  # it died before the call above
    above = {pid: _started(pid) for pid in _launchers_above(parent)}
    if above:
        threading.Thread(target=_watch, args=(above,), name="launcher", daemon=True).start()


def _launchers_above(pid: int) -> Iterator[int]:
    """A launcher's processes above this one's parent, as far as they follow one another."""
    while (pid := _stat(pid)[1]) > 1 and _is_launcher(pid):
        yield pid


def _is_launcher(pid: int) -> bool:
    """By the program, or the module that Python runs."""
    words = [Path(w).name for w in _read(pid, "cmdline").split("\0")]
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    return any(word in _PROGRAMS for word in [*words[:2], *modules])


def _watch(above: dict[int, str]) -> None:
    while True:
        time.sleep(1)
        for pid, started in above.items():
            if _started(pid) != started:
                with contextlib.suppress(OSError):  # the launcher may have been who read it
                    print(f"hybrid: the launcher (process {pid}) is gone: ending", file=sys.stderr)
                os._exit(1)


def _started(pid: int) -> str:
    """When a process started: its identity, since numbers come again. Empty where it is gone."""
    state, _, started = _stat(pid)
    return "" if state in "ZX" else started


def _stat(pid: int) -> tuple[str, int, str]:
    """State, parent and start of a process (proc(5))."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (fields[0], int(fields[1]), fields[19]) if fields else ("X", 0, "")


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""
