"""Each trouble that `hybrid doctor` looks for is found, and comes with its mend."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from hybrid.doctor import installed
from hybrid.doctor.installed import (
    accelerate_config,
    check_accelerate_config,
    check_launchers,
    check_release,
    describe,
    required,
    run_program,
    shutil,
)
from hybrid.doctor.machine import (
    check_cores,
    check_gpus,
    check_jit_cache,
    check_locked_memory,
    check_open_files,
    check_shared_memory,
    check_threads,
)
from hybrid.doctor.network import check_name, check_variable, interfaces
from hybrid.launch import threads
from hybrid.launch.ops_cache import VARIABLE
from hybrid.launch.threads import cgroup_cores, num_cores
from tests.conftest import ROOT

BOUNDS = SpecifierSet(">=0.19.3,<0.20")


@pytest.mark.parametrize(
    ("installed", "status", "words"),
    [
        (None, "error", "not installed; needed: >=0.19.3,<0.20"),
        ("0.19.2", "error", "wrong gradients"),
        ("0.9.5", "error", "wrong gradients"),
        ("0.19.3", "ok", "0.19.3"),
        ("0.19.10+cpu", "ok", "0.19.10+cpu"),
        ("0.20.0", "warning", "newer than"),
        ("0.20.0rc1", "warning", "newer than"),
        ("0.19.4rc1", "ok", "0.19.4rc1"),
        ("0.19.3rc1", "error", "wrong gradients"),
        ("0.19.3.post1+unknown", "ok", "0.19.3"),
        ("0.19.x", "warning", "PEP 440"),
    ],
)
def test_releases(installed: str | None, status: str, words: str) -> None:
    found = check_release("deepspeed", installed, BOUNDS)
    assert found.status == status and words in found.found
    assert (found.mend is None) == (status == "ok")
    assert found.mend in (None, "pip install 'deepspeed>=0.19.3,<0.20'")


def test_releases_needed_are_those_of_the_project() -> None:
    assert required()["deepspeed"] == BOUNDS
    assert check_release("torch", "2.9.1", SpecifierSet()).status == "error"
    assert check_release("torch", "2.10.0", SpecifierSet(">=2.11")).found.endswith(">=2.11")


@pytest.mark.parametrize(
    ("ranks", "setting", "status"),
    [
        (0, None, "ok"),
        (2, "1", "ok"),
        (2, "2", "warning"),
        (2, None, "ok"),
        (4, "1", "ok"),
        (5, "1", "warning"),
        (2, "many", "warning"),
    ],
)
def test_threads(ranks: int, setting: str | None, status: str) -> None:
    cores = 3 if ranks == 2 else 4
    found = check_threads(cores, ranks, setting)
    assert found.status == status, found
    if ranks == 2 and status == "warning":
        assert found.mend == "OMP_NUM_THREADS=1"


def test_a_container_s_time_counts_where_it_has_less_than_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "CGROUP_QUOTA", quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64))
    for text, time, cores in (
        ("150000 100000\n", 1.5, 1),
        ("50000 100000\n", 0.5, 1),
        ("800000 100000\n", 8, 8),
        ("max 100000\n", None, 64),
    ):
        quota.write_text(text)
        assert (cgroup_cores(quota), num_cores()) == (time, cores)
    assert cgroup_cores(tmp_path / "none") is None
    assert check_cores(8, 8.0).found == "8, with the time of 8 in this container"


def test_limits() -> None:
    assert check_shared_memory(64 * 2**20).status == "warning"
    assert check_shared_memory(2**31).status == "ok"
    assert check_open_files(256).status == "warning"
    assert check_open_files(float("inf")).status == "ok"
    assert check_locked_memory(2**16, rdma=False).status == "ok"
    assert check_locked_memory(2**16, rdma=True).status == "warning"
    assert check_gpus(["A", "A"], 3).status == "error"
    assert check_gpus(["A", "A", "B"], 3).found == "2 x A, 1 x B"


def test_jit_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale lock, an op of another installation, one of an earlier release, and one of ours."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    site = metadata.distribution("deepspeed").locate_file("")
    rules = "build a.o: compile {}/deepspeed/ops/csrc/a.cpp\n"
    for op, where in {"theirs": "/elsewhere", "old": site, "ours": site, "own": "/x"}.items():
        (tmp_path / op).mkdir()
        file = tmp_path / op / "build.ninja"
        file.write_text(rules.format(where) if op != "own" else "build a.o: compile /x/a.cpp\n")
    os.utime(tmp_path / "old" / "build.ninja", (1, 1))
    (tmp_path / "ours" / "lock").touch()
    found = list(check_jit_cache(tmp_path))
    assert [f.status for f in found] == ["warning"] * 3
    assert found[0].mend == f"rm {tmp_path / 'ours' / 'lock'}"
    whose = {f.mend.split()[2].rstrip(",") for f in found[1:] if f.mend}
    assert whose == {str(tmp_path / "theirs"), str(tmp_path / "old")}
    (clean,) = check_jit_cache(tmp_path / "none")
    assert clean.status == "ok"


CONFIG = "distributed_type: {}\nnum_processes: {}\n"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (CONFIG.format("MULTI_CPU", 2), "warning"),
        (CONFIG.format("'NO'", 4), "warning"),
        (CONFIG.format("'NO'", 1), "ok"),
        (CONFIG.format("NO", 1), "warning"),
        (CONFIG.format("MULTI_CPU", 2) + "mpirun_config: {mpirun_hostfile: hosts}\n", "ok"),
        (CONFIG.format("FSDP", 2), "warning"),
        (CONFIG.format("FSDP", 2) + "fsdp_config: {fsdp_version: 2}\n", "ok"),
        (CONFIG.format("MULTI_CPU", 2) + "mpirun_config: none\n", "warning"),
        ("a: [", "warning"),
        ("!!python/object/apply:os.system ['false']", "warning"),
        ("- a\n", "warning"),
    ],
)
def test_accelerate_config(
    text: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert accelerate_config() is None
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(text)
    (found,) = check_accelerate_config(accelerate_config())
    assert found.status == status and (found.mend is None) == (status == "ok"), found


def test_accelerate_config_is_where_accelerate_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from accelerate.commands.config.config_args import cache_dir; print(cache_dir)"
    monkeypatch.setenv("HF_HOME", str(ROOT / "nowhere"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "nowhere" / "accelerate")


def test_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another Python, one that is broken, one that is not there."""
    for name, code in {"torchrun": 0, "srun": 1}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} says so\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(shutil, "which", lambda n: which_in(tmp_path, n))
    found = {f.name.removeprefix("launcher "): f for f in check_launchers()}
    assert "another Python's" in found["torchrun"].found
    assert found["torchrun"].mend == "call it as `python -m torch.distributed.run`"
    assert found["srun"].status == "warning" and "srun says so" in found["srun"].found
    assert found["mpirun"].status == "ok" and found["mpirun"].found.startswith("not found")
    assert "not in PATH" in found["accelerate"].found


def which_in(folder: Path, name: str) -> str | None:
    return str(folder / name) if (folder / name).exists() else None


def test_mpich_is_told_from_open_mpi() -> None:
    hydra = ["HYDRA build details:", "Version:            4.0.2", "CC: gcc"]
    assert describe("mpirun", hydra) == "MPICH (Hydra) 4.0.2"
    assert describe("mpirun", ["mpirun (Open MPI) 4.1.4"]) == "mpirun (Open MPI) 4.1.4"


def test_a_program_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PROGRAM_S", 0.2)
    works, lines = run_program([sys.executable, "-c", "import time; time.sleep(60)"])
    assert not works and "timed out" in lines[0]


THERE = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": ""}


@pytest.mark.parametrize(
    ("address", "several", "chosen", "status", "words"),
    [
        ("127.0.1.1", False, None, "ok", "the loopback"),
        ("127.0.1.1", True, None, "warning", "other hosts cannot reach"),
        ("127.0.1.1", True, "eth0", "ok", "eth0 is taken"),
        ("10.0.0.5", True, None, "ok", "on eth0"),
        ("10.9.9.9", False, None, "warning", "no interface here has"),
        ("fd00::5", True, None, "ok", "fd00::5"),
        (None, False, None, "warning", "does not resolve"),
    ],
)
def test_the_host_s_name(
    address: str | None, several: bool, chosen: str | None, status: str, words: str
) -> None:
    found = check_name("h1", address, THERE, several, chosen)
    assert found.status == status and words in found.found, found
    if status == "warning":
        assert found.mend and "GLOO_SOCKET_IFNAME=eth0" in found.mend


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0,lo", "ok"),
        ("GLOO_SOCKET_IFNAME", "eth", "error"),
        ("GLOO_SOCKET_IFNAME", "eth0,eth7", "error"),
        ("GLOO_SOCKET_IFNAME", "", "error"),
        ("NCCL_SOCKET_IFNAME", "eth", "ok"),
        ("NCCL_SOCKET_IFNAME", "=eth", "error"),
        ("NCCL_SOCKET_IFNAME", "=eth0", "ok"),
        ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
        ("NCCL_SOCKET_IFNAME", "wlan", "error"),
    ],
)
def test_interfaces_by_variable(variable: str, value: str, status: str) -> None:
    found = check_variable(variable, value, THERE)
    assert found.status == status
    assert (status == "ok") == (found.mend is None)


def test_interfaces_are_this_machine_s() -> None:
    there = interfaces()
    assert set(there) == {name for _, name in socket.if_nameindex()}
    if sys.platform == "linux":
        assert there.get("lo") == "127.0.0.1"
