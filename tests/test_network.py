"""On one host ranks listen on the loopback alone, at a port that is held for them."""

from __future__ import annotations

import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from hybrid.launch import process_group
from hybrid.launch.held_port import LOOPBACK, VARIABLE, hold_port, take_held_port
from hybrid.launch.local import run_ranks
from hybrid.launch.placement import OWN, Placement, loopback_address
from hybrid.launch.warm import warm_ranks
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import small_job
from tests.listeners import Watch, listeners, open_to_all

DATA = {"name": "tests.listeners:data", "options": {"samples": 37, "features": 32}}


@pytest.mark.parametrize("strategy", ["fsdp", "2d"])
def test_no_socket_of_a_run_is_open_to_other_hosts(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do ranks unpickle what comes over one: the data set has them refuse it."""
    others = [n for n, f in psutil.net_if_addrs().items() if f[0].address != LOOPBACK]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", (others or ["lo"])[0])  # of a run on several hosts
    checkpoint = {"every": 2, "async": True}
    job = small_job(data=DATA, train__steps=4, checkpoint=checkpoint)
    with Watch() as watch:
        assert launch(job, strategy, 4, tmp_path, Watcher()).status == "ok"
    ranks = {pid for pid, *_ in watch.found}
    assert len(ranks) >= 4 and len(watch.found) > len(ranks), "the store, and gloo of each rank"
    assert open_to_all(watch.found) == []
    if others:
        assert "GLOO_SOCKET_IFNAME = " in (tmp_path / "logs" / "rank0.log").read_text()


@pytest.mark.parametrize("ours", [True, False])
def test_a_store_that_listens_everywhere_is_seen(ours: bool) -> None:
    placement = Placement(launcher=OWN)
    with hold_port() as free:
        port = free.getsockname()[1]
    descriptor = process_group._bind(placement, port) if ours else None
    store = dist.TCPStore(
        LOOPBACK, port, 1, True, timedelta(seconds=5), False, master_listen_fd=descriptor
    )
    found = {key: words for key, words in listeners([psutil.Process()]).items() if key[2] == port}
    assert found and bool(open_to_all(found)) != ours
    del store


HOLDS = f"""
import os, socket, sys, time
from pathlib import Path
from hybrid.launch.held_port import take_held_port
rank, port, folder = os.environ["RANK"], int(os.environ["MASTER_PORT"]), Path(sys.argv[1])
if rank == "0":
    while len(list(folder.glob("tried*"))) < 3: time.sleep(0.01)
    print("held", take_held_port() is not None)
    sys.exit()
assert "{VARIABLE}" not in os.environ
for address in ("{LOOPBACK}", "0.0.0.0"):
    try:
        socket.create_server((address, port))
        print("taken")
    except OSError as error:
        print(error.errno)
(folder / f"tried{{rank}}").touch()
deadline = time.monotonic() + 20
while time.monotonic() < deadline:
    try:
        with socket.create_server(("{LOOPBACK}", port)):
            sys.exit(time.sleep(0.2))
    except OSError:
        time.sleep(0.01)
sys.exit("rank 0 has ended, and the port is still held")
"""


@pytest.mark.parametrize("fresh", [False, True])
def test_the_port_is_held_from_before_the_ranks_start_until_rank_0_ends(
    fresh: bool, tmp_path: Path
) -> None:
    (tmp_path / "holds.py").write_text(HOLDS)
    with warm_ranks(fresh):
        program = [sys.executable, str(tmp_path / "holds.py")]
        run_ranks(4, [str(tmp_path)], tmp_path, program=program)
    logs = [(tmp_path / "logs" / f"rank{rank}.log").read_text().split() for rank in range(4)]
    assert logs[0] == ["held", "True"]
    assert len({tuple(log) for log in logs[1:]}) == 1 and "taken" not in logs[1]


def test_only_a_socket_that_has_the_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_port() as held, socket.socket() as other, open(os.devnull) as file:
        monkeypatch.setenv("MASTER_PORT", str(held.getsockname()[1]))
        for value in ("", "x", "-1", "9" * 30, "999", str(file.fileno()), str(other.fileno())):
            monkeypatch.setenv(VARIABLE, value)
            assert take_held_port() is None and VARIABLE not in os.environ
        assert other.fileno() > 0 and file.read() == ""
        monkeypatch.setenv(VARIABLE, str(held.fileno()))
        assert take_held_port() == held.fileno()
        assert not os.get_inheritable(held.fileno())


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n7"}, LOOPBACK),
        (TORCHRUN | {"LOCAL_SIZE": "4", "MASTER_ADDR": "n7"}, LOOPBACK),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n7"}, None),
        (TORCHRUN | {"MASTER_ADDR": "10.0.0.7"}, None),
        (TORCHRUN | {"MASTER_ADDR": "localhost"}, LOOPBACK),
        (TORCHRUN | {"MASTER_ADDR": "127.0.0.3"}, "127.0.0.3"),
        (TORCHRUN | {"MASTER_ADDR": "::1"}, "::1"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4", "MASTER_ADDR": "n7"}, LOOPBACK),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "MASTER_ADDR": "n7"}, None),
    ],
)
def test_runs_on_one_host_are_told_from_others(
    variables: dict[str, str], address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [key for key in os.environ if key.startswith(("SLURM_", "OMPI_", "PMI_"))]:
        monkeypatch.delenv(key)
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert (
        loopback_address(Placement(1, 4, 1, "srun" if "RANK" not in variables else "torchrun"))
        == address
    )
    assert loopback_address(Placement(1, 4, 1, OWN)) in (address, LOOPBACK)
