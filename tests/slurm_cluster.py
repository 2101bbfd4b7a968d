"""A SLURM of two virtual nodes on this machine, for tests: real daemons, as Debian packages them
(slurmctld, slurmd, slurm-client, munge), without systemd and cgroups.

    with cluster(folder) as environ:
        subprocess.run(["sinfo"], env=environ)

Keys, sockets and ports are its own, so that another SLURM of this machine is not touched. Its
daemons end with the block, each by its process; no others are looked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = ("n1", "n2")
KILL_WAIT_S = 5
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """What this machine lacks for it; None where nothing."""
    if os.geteuid():
        return "its daemons run as root"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=_path())]
    return f"not installed: {', '.join(absent)}" if absent else None


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A SLURM whose nodes are idle; gives the environment for its commands."""
    environ = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    text = CONFIGURATION.format(
        folder=folder, host=socket.gethostname(), ports=free_ports(3), kill_wait=KILL_WAIT_S
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    places = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
    munge = [f"--{option}={folder}/munge.{end}" for option, end in places.items()]
    commands = {
        "munged": ["munged", "--foreground", "--force", *munge, f"--seed-file={folder}/seed"],
        "slurmctld": ["slurmctld", "-c", "-D"],
        **{node: ["slurmd", "-c", "-D", "-N", node] for node in NODES},
    }
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            log = stack.enter_context((folder / f"{name}.out").open("wb"))
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
            stack.callback(_end, daemon)
            if name == "munged":
                _wait_for((folder / "munge.socket").exists, folder)
        _wait_for(lambda: _idle(environ), folder)
        yield environ


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


def _idle(environ: dict[str, str]) -> bool:
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    states = subprocess.run(words, env=environ, capture_output=True, text=True).stdout.split()
    return states == ["idle"] * len(NODES)


def _wait_for(condition: Callable[[], bool], folder: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = {file.name: file.read_text()[-2000:] for file in folder.glob("*.out")}
        assert time.monotonic() < deadline, f"SLURM did not start: {logs}"
        time.sleep(0.2)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
