"""A rank that has no memory says where, how much it wanted, and what takes less."""

from __future__ import annotations

import resource
import traceback
from pathlib import Path

import pytest

from hybrid.job.variants import resolve
from hybrid.launch.failures import (
    RankStatus,
    describe_out_of_memory,
    is_for_memory,
    is_out_of_memory,
    leave_error,
)
from hybrid.launch.first_cause import first_cause
from hybrid.launch.placement import Placement
from hybrid.training.folder import end_run
from tests.conftest import small_job
from tests.test_first_cause import here, raised

HOST_FULL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4194304 bytes. Error code 12 (Cannot allocate memory)"
)


class OutOfMemoryError(RuntimeError):
    """Stands in for torch's, which is raised where there is a GPU."""


GPU_FULL = OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.00 GiB is free."
)


def test_which_errors_are_of_memory() -> None:
    assert all(is_out_of_memory(e) for e in (HOST_FULL, GPU_FULL, MemoryError()))
    assert not is_out_of_memory(RuntimeError("the memory of an elephant"))


def test_a_lack_of_memory_says_where_how_much_and_what_takes_less() -> None:
    at = RankStatus(small_job(optimizer={"name": "adamw", "lr": 0.1}), Placement())
    at.set("in step 3")
    at.parameters = at.held = 2**20
    said = describe_out_of_memory(HOST_FULL, at)
    assert said.startswith("out of memory in step 3; could not allocate 4194304 bytes; "), said
    assert "this rank holds all 1,048,576 parameters of the model: " in said
    assert "adamw they take 16 bytes each in fp32, 16 MiB" in said
    assert "fsdp, zero3, pipeline and 2d" in said and "\n" not in said


def test_of_an_optimizer_of_ones_own_the_state_is_not_guessed() -> None:
    own = {"name": "torch.optim:Adam", "lr": 0.1}
    at = RankStatus(small_job(optimizer=own), Placement())
    at.parameters = at.held = 2**20
    said = describe_out_of_memory(HOST_FULL, at)
    assert "with gradients they take 8 bytes each in fp32, 8 MiB; the state of torch.opt" in said


def test_of_a_shard_its_own_parameters_are_counted() -> None:
    sgd = {"name": "sgd", "lr": 0.1}
    at = RankStatus(small_job(optimizer=sgd), Placement())
    at.parameters, at.held = 4 * 2**20, 2**20
    said = describe_out_of_memory(GPU_FULL, at)
    assert "this rank holds 1,048,576 of the model's 4,194,304 parameters: " in said
    assert "8 bytes each in fp32, 8 MiB" in said
    assert "could not allocate 2.00 GiB" in said and "the GPU has 79.11 GiB" in said
    at.job = small_job(optimizer=sgd | {"momentum": 0.9})
    assert "12 bytes each in fp32, 12 MiB" in describe_out_of_memory(GPU_FULL, at)


def test_before_there_is_an_engine_the_whole_model_is_counted() -> None:
    at = RankStatus(small_job(), Placement())
    assert describe_out_of_memory(MemoryError(), at).startswith("out of memory starting;")
    at.parameters = 2**20
    assert "the model has 1,048,576 parameters: " in describe_out_of_memory(MemoryError(), at)


def test_a_limit_of_the_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_DATA: 3 * 2**30, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], -1))
    said = describe_out_of_memory(MemoryError(), RankStatus(small_job(), Placement()))
    assert "RLIMIT_DATA allows this process 3,072 MiB in all" in said and "RLIMIT_AS" not in said


def test_a_lack_of_memory_is_left_and_noted(tmp_path: Path) -> None:
    error = raised(MemoryError())
    leave_error(error, here(1, tmp_path))
    found = first_cause({1: 1}, tmp_path, seen=0.0)
    assert found.message.startswith("out of memory starting")
    assert error.__notes__ == [found.message]  # what a launcher that prints the error shows
    record = end_run(tmp_path, resolve(small_job(), "ddp"), 2, error)  # of a rank of torchrun
    assert record.reason == f"rank 0: {found.message}" and is_for_memory(record.reason)


def test_no_memory_for_a_trace_costs_the_trace_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(error: BaseException) -> list[str]:
        raise MemoryError

    monkeypatch.setattr(traceback, "format_exception", full)
    leave_error(MemoryError(), here(0, tmp_path))
    monkeypatch.undo()
    found = first_cause({0: 1}, tmp_path, seen=0.0)
    assert found.message.startswith("out of memory") and found.details == ""
