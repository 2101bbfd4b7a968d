"""This module places a process in its run: rank, host, device, coordinates in the layout, store.

A run makes one `Placement` and passes it on; nothing else asks the environment for a rank. torch is
imported only when a device is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..job.errors import JobError
from ..layout import Layout
from .environment import VARIABLES, launcher_name, num_local_ranks, read_number, variables_of
from .held_port import LOOPBACK
from .variable_check import check_variables

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

PORTS = range(20000, 30000)  # below Linux's ephemeral ports (net.ipv4.ip_local_port_range)
BOOT = Path("/proc/sys/kernel/random/boot_id")
OWN = "hybrid"  # the launcher's name where `hybrid` itself started this rank


@dataclasses.dataclass(frozen=True)
class Placement:
    """Describes one process of a run.

    `launcher` started it (None: no launcher did, the process is alone). `layout` is the run's once
    it is known. `store` is where the ranks met (None: they have not met, or the process is alone).
    `launched`: `hybrid` had the launcher start it, and has begun the folder of the run.
    `device_asked` is the job's `launch.device`. `gpu` is this rank's among the GPUs that it sees;
    ranks settle that where they meet (`hybrid.launch.devices`), and also `local_rank` where the
    launcher did not tell it (`local_known`).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str | None = None
    layout: Layout = dataclasses.field(default_factory=Layout)
    store: dist.Store | None = None
    launched: bool = False
    device_asked: str = "auto"
    gpu: int = 0
    local_known: bool = True

    @property
    def host(self) -> str:
        """Return this host's name."""
        return socket.gethostname()

    @property
    def host_id(self) -> str:
        """Return what tells this host from all others: two may have one name, as localhost."""
        return f"{self.host}/{BOOT.read_text().strip() if BOOT.exists() else ''}"

    @property
    def device(self) -> torch.device:
        """Return this rank's GPU where the host has one and the job allows it, else the CPU.

        Raises JobError where the job asks for a GPU and there is none."""
        import torch

        if self.device_asked != "cpu" and torch.cuda.is_available():
            return torch.device("cuda", self.gpu)
        if self.device_asked == "cuda":
            raise JobError(
                f"launch.device = 'cuda': torch sees no GPU on {self.host}; valid: auto, cpu"
            )
        return torch.device("cpu")

    @property
    def backend(self) -> str:
        """Return the collective library for this device: nccl on GPUs, gloo on CPUs."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    @property
    def stage(self) -> int:
        """Return the pipeline stage that this rank holds."""
        return self.layout.stage(self.rank)

    @property
    def dp_rank(self) -> int:
        """Return the data-parallel rank: which share of a batch this rank computes."""
        return self.layout.dp_rank(self.rank)

    @property
    def under_foreign_launcher(self) -> bool:
        """Tell whether another program than `hybrid` started this rank."""
        return self.launcher not in (None, OWN)


def find_placement(started_by_hybrid: bool = False) -> Placement:
    """Place this process by its launcher's variables; without a launcher it is a process alone.

    Raises JobError where the launcher's variables make no sense."""
    # `export_rank_variables` sets the port to 0 for a rank which is alone.
    check_variables(lowest_port=0, counts=not started_by_hybrid)
    kind = variables_of()
    if kind is None:
        return Placement()
    rank, world, local, _ = (read_number(key) for key in VARIABLES[kind])
    assert rank is not None and world is not None  # `check_variables` requires both
    launcher = OWN if started_by_hybrid else launcher_name()
    known = local is not None or world == 1
    return Placement(rank, world, rank if local is None else local, launcher, local_known=known)


def set_apart(placement: Placement, nproc: int | None) -> Placement:
    """Return the placement of this process where it is asked to start `nproc` ranks itself.

    A launcher that started one process has given it a place to work in, such as a shell or a
    notebook. One that started several has started the ranks."""
    if placement.launcher in (None, OWN) or placement.world_size > 1 or nproc in (None, 1):
        return placement
    print(
        f"hybrid: {placement.launcher} started this one process, which starts the {nproc} ranks",
        file=sys.stderr,
    )
    return Placement()


def export_rank_variables(placement: Placement) -> None:
    """Set the variables that torch, Accelerate and DeepSpeed read, where the launcher did not.

    Raises JobError where the address of rank 0 cannot be known."""
    found = {
        "RANK": placement.rank,
        "WORLD_SIZE": placement.world_size,
        "LOCAL_RANK": placement.local_rank if placement.local_known else None,
        "LOCAL_WORLD_SIZE": num_local_ranks(),
    }
    kind = variables_of()
    for key, value in found.items():
        if value is not None:
            os.environ.setdefault(key, str(value))
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        address, port = ("localhost", 0) if kind is None else _find_rendezvous(kind, placement)
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))


def loopback_address(placement: Placement) -> str | None:
    """Return this host's own address where all ranks of the run are on it, else None.

    That is what the launcher says, or the address at which MASTER_ADDR has the ranks meet."""
    named = os.environ.get("MASTER_ADDR", "")
    own = (placement.launcher in (None, OWN)) or num_local_ranks() == placement.world_size
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(named).is_loopback:
            return named
    return LOOPBACK if own or named == "localhost" else None


def _find_rendezvous(kind: str, placement: Placement) -> tuple[str, int]:
    """Return rank 0's address and port, the same on every rank without asking another one."""
    if placement.world_size == 1:
        return "localhost", 0
    if kind == "srun":
        job, step = read_number("SLURM_JOB_ID") or 0, read_number("SLURM_STEP_ID") or 0
        return _first_node(), PORTS[(1009 * job + step) % len(PORTS)]
    if num_local_ranks() == placement.world_size:
        return "localhost", PORTS[os.getppid() % len(PORTS)]  # all ranks of a host have one parent
    how = {
        "Open MPI": "start Open MPI with -x MASTER_ADDR=... -x MASTER_PORT=...",
        "MPICH": "start MPICH with -genv NAME VALUE",
        "torchrun": "set them on every host, as RANK and WORLD_SIZE, or LOCAL_WORLD_SIZE on one",
    }
    raise JobError(
        "MASTER_ADDR and MASTER_PORT are not set, and ranks on several hosts need to be told where "
        f"rank 0 is: {how[kind]}"
    )


def _first_node() -> str:
    """Return the host of a SLURM job step's rank 0; raises JobError if SLURM does not tell it."""
    if read_number("SLURM_STEP_NUM_NODES") == 1:
        return "localhost"
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    try:
        first = _scontrol("show", "hostnames", nodes).split()[0]
        try:
            socket.getaddrinfo(first, None)
        except OSError:  # the node's name is not its host's name; SLURM knows the address
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
