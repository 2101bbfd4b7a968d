"""Which device each rank has, against a stub of torch.cuda: this machine has no GPU.

The stub shows ranks what hosts with 0, 1, 2 and 8 GPUs would, and the rules run for real. That nccl
and the engines then work on those devices is not shown here (`benchmarks/gpu.py` does that)."""

from __future__ import annotations

import dataclasses
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybrid.job.errors import JobError, Refused
from hybrid.job.schema import Launch
from hybrid.launch import devices, exchange, process_group
from hybrid.launch.failures import RankStatus
from hybrid.launch.placement import Placement, find_placement
from hybrid.measure.memory import StorageMeter
from hybrid.strategies import registry
from hybrid.training.beginning import meet
from hybrid.training.early import check_early
from tests.conftest import ROOT, small_job
from tests.stub_cuda import Host, StubCuda, settle_all

GPUS = [f"GPU-{n}" for n in range(8)]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StubCuda:
    return StubCuda(monkeypatch, tmp_path / "nvidiactl")


def ranks_of(local_ranks: Sequence[int | None], hosts: str) -> list[Placement]:
    """Ranks on hosts with names of one letter; one without a local rank has to find it."""
    Host.names = {rank: (name, f"boot of {name}") for rank, name in enumerate(hosts)}
    return [
        Host(rank, len(hosts), rank if local is None else local, local_known=local is not None)
        for rank, local in enumerate(local_ranks)
    ]


# Before any process starts


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_more_ranks_than_gpus_are_refused_with_what_to_do(cuda: StubCuda, gpus: int) -> None:
    job, names = small_job(), ["single", "ddp", "fsdp"]
    with cuda.sees(GPUS[:gpus]):
        for nproc in (1, 2, 4, 8):
            if 0 < gpus < nproc:
                with pytest.raises(JobError) as raised:
                    check_early(job, names, nproc)
                said = str(raised.value)
                assert said.startswith(f"--nproc {nproc}: this host has {gpus} GPU")
                assert said.endswith(f"valid: --nproc {gpus}, or launch.device = 'cpu'")
                assert devices.device_for(nproc) == "cpu"
            else:
                assert check_early(job, names, nproc) == nproc
                assert devices.device_for(nproc) == "auto"
            assert check_early(small_job(launch__device="cpu"), names, nproc) == nproc
            assert check_early(job, names, nproc, here=False) == nproc  # a launcher starts them


def test_one_process_needs_one_gpu_whatever_nproc_says(cuda: StubCuda) -> None:
    emulation = small_job(strategy__local_sgd={"emulate_replicas": 4, "sync_every": 1})
    with cuda.sees(GPUS[:1]):
        assert check_early(small_job(), ["single"], 4) == 4
        assert check_early(emulation, ["local_sgd"], 1) == 1
        with pytest.raises(JobError, match="--nproc 4: this host has 1 GPU, "):
            check_early(emulation, ["local_sgd", "ddp"], 4)  # of which one alone is emulated
        changed = {"strategy": "local_sgd", "emulate_replicas": 4}
        assert check_early(small_job(variant={"played": changed}), ["played"], 1) == 1


def test_fewer_ranks_are_no_way_out_where_degrees_ask_for_them(cuda: StubCuda) -> None:
    job = small_job(parallel={"pp": 2, "dp": 2})
    with cuda.sees(GPUS[:3]):
        with pytest.raises(JobError) as raised:
            check_early(job, ["2d"], None)
        assert str(raised.value).endswith("GPU of its own; valid: launch.device = 'cpu'")
        assert check_early(job, ["2d"], None, starts=False) == 4  # as `hybrid check` asks


def test_a_gpu_that_is_asked_for_has_to_be_there(cuda: StubCuda) -> None:
    job = small_job(launch__device="cuda")
    with pytest.raises(JobError, match=r"launch\.device = 'cuda': torch sees no GPU .* auto, cpu"):
        check_early(job, ["ddp"], 2)
    here = registry.place(job, "single", Placement())
    with pytest.raises(JobError, match=r"launch\.device = 'cuda': torch sees no GPU"):
        assert here.device
    with cuda.sees(GPUS[:2]):
        assert check_early(job, ["ddp"], 2) == 2 and here.device == torch.device("cuda", 0)
        on_cpu = registry.place(small_job(launch__device="cpu"), "single", Placement())
        assert on_cpu.device == torch.device("cpu") and on_cpu.backend == "gloo"


def test_without_a_driver_torch_is_not_imported_to_count(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; from hybrid.launch.devices import count_gpus; print(count_gpus())"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout == "0\n"
    monkeypatch.setattr(devices, "DRIVERS", (Path("/"),))
    monkeypatch.setattr(devices, "COUNT", "print(3)")  # a process of its own counts
    monkeypatch.delitem(sys.modules, "torch")
    assert devices.count_gpus() == 3


def test_processes_see_no_gpu_where_the_job_asks_for_the_cpu(
    cuda: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("DS_ACCELERATOR")  # conftest.py sets it
    with devices.gpus_hidden("auto"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
    with devices.gpus_hidden("cpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5" and "DS_ACCELERATOR" not in os.environ
    monkeypatch.setattr(devices, "DRIVERS", ())  # a host without a GPU stays as it is
    with devices.gpus_hidden("cpu"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


# Where ranks meet


def test_each_rank_takes_the_gpu_of_its_local_rank(cuda: StubCuda) -> None:
    order = random.sample(range(4), 4)  # launchers number hosts' ranks as they like
    found = settle_all(cuda, ranks_of(order, "aaaa"), [GPUS[:4]] * 4)
    assert [getattr(one, "gpu", one) for one in found] == order


def test_a_scheduler_shows_each_rank_its_own_gpu_as_device_0(cuda: StubCuda) -> None:
    """SLURM's --gpus-per-task=1, on two hosts: LOCAL_RANK is 3, and the only device is 0."""
    seen = [[gpu] for gpu in GPUS[:4]] * 2  # the hosts' GPUs have names of their own in truth
    found = settle_all(cuda, ranks_of([0, 1, 2, 3] * 2, "aaaabbbb"), seen)
    assert [(one.gpu, one.local_rank) for one in found] == [(0, n) for n in (0, 1, 2, 3)] * 2  # type: ignore[union-attr]
    with cuda.sees(["GPU-3"]):
        assert found[3].device == torch.device("cuda", 0)  # type: ignore[union-attr]


def test_two_devices_for_each_rank(cuda: StubCuda) -> None:
    found = settle_all(cuda, ranks_of([0, 1], "aa"), [GPUS[:2], GPUS[2:4]])
    assert [one.gpu for one in found] == [0, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_four_ranks_never_share_a_gpu(cuda: StubCuda, gpus: int) -> None:
    """Refused on all ranks alike, also on those of a host that has enough."""
    found = settle_all(cuda, ranks_of([0, 1, 2, 3, 0], "aaaab"), [*[GPUS[:gpus]] * 4, GPUS])
    (said,) = {str(one) for one in found}
    assert all(isinstance(one, Refused) for one in found)
    assert said.startswith(f"4 ranks on a: they see {gpus} GPU") and "launch.device = 'cpu'" in said


def test_a_rank_without_a_gpu_among_others_is_named_on_all(cuda: StubCuda) -> None:
    guilty = random.randrange(4)
    seen = [[] if rank == guilty else GPUS[:4] for rank in range(4)]
    (said,) = {str(one) for one in settle_all(cuda, ranks_of([0, 1, 0, 1], "aabb"), seen)}
    host = "aabb"[guilty]
    assert said.startswith(f"rank {guilty} on {host} sees no GPU, and rank {int(guilty == 0)} on a")


def test_local_ranks_that_no_launcher_tells_come_from_the_hosts(cuda: StubCuda) -> None:
    """As under Kubeflow, Ray, and MPICH without its local rank: round robin over three hosts, of
    which two have one name."""
    places = ranks_of([None] * 6, "abcabc")
    Host.names = {rank: (re.sub("[bc]", "localhost", host), boot) for rank, (host, boot) in
                  Host.names.items()}  # fmt: skip
    on_gpus = settle_all(cuda, places, [GPUS[:2]] * 6)
    on_cpus = settle_all(cuda, places, [[]] * 6)
    assert [(one.local_rank, one.gpu) for one in on_gpus] == [(n // 3, n // 3) for n in range(6)]  # type: ignore[union-attr]
    assert [one.local_rank for one in on_cpus] == [n // 3 for n in range(6)]  # type: ignore[union-attr]
    assert all(one.local_known for one in (*on_gpus, *on_cpus))  # type: ignore[union-attr]


def test_a_gpu_that_no_rank_has_is_refused_before_the_folder_changes(cuda: StubCuda) -> None:
    places = ranks_of([0, 1, 2, 3], "aabb")
    places = [dataclasses.replace(one, device_asked="cuda") for one in places]
    found = settle_all(cuda, places, [[]] * 4)
    assert all(isinstance(one, Refused) for one in found)
    (said,) = {str(one) for one in found}
    assert said == "launch.device = 'cuda': torch sees no GPU on this host; valid: auto, cpu"
    with pytest.raises(Refused, match=r"launch\.device = 'cuda': torch sees no GPU"):
        meet(Placement(device_asked="cuda"), small_job(), RankStatus(small_job(), Placement()))


# What a rank does with its device


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`join_process_group` with a store of its own, and what it gives torch."""
    given: dict[str, Any] = {}
    store = dist.HashStore()
    for other in (0, 1, 2):
        store.set(f"hybrid/arrived/{other}", "elsewhere")
        store.set(f"hybrid/placed/{other}", "")
    monkeypatch.setattr(process_group, "_open_store", lambda *_: store)
    monkeypatch.setattr(dist, "init_process_group", lambda *words, **rest: given.update(
        {"backend": words[0], **rest}))  # fmt: skip
    monkeypatch.setattr(dist.distributed_c10d, "default_pg_timeout", None)
    monkeypatch.setattr(dist.distributed_c10d, "default_pg_nccl_timeout", None)
    monkeypatch.setattr(process_group, "mark", lambda: None)
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return given


def test_a_rank_joins_nccl_with_its_device_and_the_jobs_patience(
    cuda: StubCuda, joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    try:
        with cuda.sees(["GPU-3"]):
            here = process_group.join_process_group(find_placement(), Launch(setup_timeout_s=77))
            assert joined["backend"] == "nccl" and joined["device_id"] == torch.device("cuda", 0)
            assert joined["timeout"] == timedelta(seconds=77) and cuda.current == [0]
            assert dist.distributed_c10d.default_pg_nccl_timeout == timedelta(seconds=77)
            monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
            assert exchange.group_device() == torch.device("cuda", 0)
            # Accelerate and DeepSpeed read LOCAL_RANK as the index of the device.
            process_group.name_device(here)
            assert os.environ["LOCAL_RANK"] == os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0"
            assert here.local_rank == 3
            # A caller who has joined, and then opens an engine by a placement that it found anew.
            monkeypatch.setattr(dist, "is_initialized", lambda: True)
            again = process_group.join_process_group(Placement(3, 4, 3))
            assert (again.gpu, again.local_rank) == (0, 3)
            monkeypatch.setattr(dist, "is_initialized", lambda: False)
    finally:
        process_group.cleanup()
    assert os.environ["LOCAL_RANK"] == "3"


def test_a_rank_without_local_rank_learns_it_where_it_joins(joined: dict[str, Any]) -> None:
    assert "LOCAL_RANK" not in os.environ
    try:
        here = process_group.join_process_group(find_placement())
        assert joined["backend"] == "gloo" and joined["device_id"] is None
        assert here.local_rank == 0 and os.environ["LOCAL_RANK"] == "0"  # no other is on this host
        assert os.environ["LOCAL_WORLD_SIZE"] == "1"
    finally:
        process_group.cleanup()
    assert "LOCAL_RANK" not in os.environ and "LOCAL_WORLD_SIZE" not in os.environ


def test_a_gpu_in_use_cannot_be_hidden(cuda: StubCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(JobError, match=r"launch\.device = 'cpu': this process uses a GPU already"):
        process_group.hide_gpus("cpu")


def test_the_meter_reads_the_allocator_of_this_ranks_gpu(
    cuda: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.device]] = []
    for name, size in (("memory_allocated", 10), ("max_memory_allocated", 30)):

        def read(device: torch.device, name: str = name, size: int = size) -> int:
            asked.append((name, device))
            return size  # fmt: skip

        monkeypatch.setattr(torch.cuda, name, read)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with StorageMeter(torch.device("cuda", 5)) as meter:
        assert (meter.live_bytes, meter.peak_bytes) == (10, 30)
    assert meter.how == "torch.cuda.max_memory_allocated"
    assert {device for _, device in asked} == {torch.device("cuda", 5)}
