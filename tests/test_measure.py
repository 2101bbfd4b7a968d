"""The instruments against figures known beforehand, in one process and in groups of 2 and 4."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hybrid.launch.local import run_ranks
from hybrid.measure.memory import StorageMeter
from hybrid.measure.traffic import CollectiveCounter, tcp_bytes_sent
from hybrid.strategies import registry

WORKER = Path(__file__).with_name("_measure_worker.py")
STEPS, EXCHANGES = 3, 20  # as in the worker
LARGE = 4_000_000


# Memory


def build_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 1024), nn.Linear(1024, 256))


def adamw_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 256)).sum().backward()
    optimizer.step()


def test_the_meter_of_a_gpu_initialises_cuda_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch resets no peak in a process that has not used its GPU yet: Invalid device argument."""
    calls: list[str] = []
    for name in ("init", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: calls.append(name))
    with StorageMeter("cuda"):
        assert calls == ["init", "reset_peak_memory_stats"]


def test_adamw_holds_what_theory_says() -> None:
    meter = StorageMeter()
    with meter:
        model = build_mlp()
        sizes = [parameter.numel() for parameter in model.parameters()]
        total = sum(sizes)
        assert meter.live_bytes == 4 * total
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            adamw_step(model, optimizer)
        # Parameter, gradient and two moments; AdamW's step counters are a few bytes more.
        assert meter.live_bytes == pytest.approx(16 * total, rel=1e-3)
        optimizer.zero_grad()
    assert meter.live_bytes == pytest.approx(12 * total, rel=1e-3)
    # Updating one parameter after the other needs two temporaries of its size.
    assert meter.peak_bytes == pytest.approx(16 * total + 2 * 4 * max(sizes), rel=1e-2)
    assert meter.how == "counted tensor storages"


def test_views_of_a_storage_count_once() -> None:
    meter = StorageMeter()
    with meter:
        whole = torch.zeros(1000)
        views = [whole[10:], whole.view(10, 100), whole.detach(), nn.Parameter(whole)]
        assert meter.live_bytes == 4000
        del whole
        assert meter.live_bytes == 4000  # the views keep all of it
        del views
    assert meter.live_bytes == 0


def test_entering_again_keeps_counting() -> None:
    meter = StorageMeter()
    with meter:
        kept, freed, resized = torch.zeros(1000), torch.zeros(500), torch.zeros(100)
        assert meter.live_bytes == 6400
    unseen = torch.zeros(7000)
    del freed
    assert meter.live_bytes == 4400
    resized.untyped_storage().resize_(0)
    with meter:
        assert meter.live_bytes == 4000
        more = torch.zeros(10)
        assert meter.live_bytes == 4040
        assert meter.peak_bytes == 6400
        unseen.sum()
        assert meter.live_bytes == 32040
    assert meter.peak_bytes == 32044  # with the result of the sum
    del kept, more
    assert meter.live_bytes == 28000


def test_resized_storages_count_as_they_are() -> None:
    meter = StorageMeter()
    with meter:
        tensor = torch.zeros(1000)
        tensor.untyped_storage().resize_(0)
        assert meter.live_bytes == 0
        tensor.untyped_storage().resize_(8000)
        assert meter.live_bytes == 8000
        torch.zeros(1).resize_(5000)
        assert meter.live_bytes == 8000
    assert meter.peak_bytes == 28000
    assert "resize_" not in vars(torch.UntypedStorage)


def test_tensors_without_memory_count_nothing_and_those_of_numpy_do() -> None:
    meter = StorageMeter()
    with meter:
        meta = torch.zeros(1000, device="meta") + 1
        assert meta.untyped_storage().nbytes() == 4000
        null = torch._C._construct_storage_from_data_pointer(0, torch.device("cpu"), 4000)
        empty = torch.empty(0).set_(null)
        assert (empty.untyped_storage().nbytes(), empty.data_ptr()) == (4000, 0)
        assert meter.live_bytes == 0
        foreign = torch.from_numpy(np.zeros(50))
        assert meter.live_bytes == foreign.nbytes == 400


def test_a_meter_that_is_entered_cannot_be_entered_again() -> None:
    meter = StorageMeter()
    with meter, pytest.raises(RuntimeError, match="already entered"):
        meter.__enter__()


# Communication


def run_workers(size: int, out: Path) -> list[dict[str, Any]]:
    """What each rank wrote."""
    program, modules = [sys.executable, str(WORKER)], registry.modules("fsdp")
    run_ranks(size, [str(out)], out, program=program, modules=modules)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_workers(request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


def test_ddp_reduces_its_parameters_once_a_step(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    for rank in ranks:
        bytes_ = 4 * rank["num_parameters"] * STEPS
        assert rank["ddp"]["counts"].keys() == {"all_reduce"}
        reduced = rank["ddp"]["counts"]["all_reduce"]
        assert reduced["payload_bytes"] == bytes_
        assert reduced["sent_bytes"] == pytest.approx(2 * (size - 1) / size * bytes_)
        # AdamW's 12 bytes a parameter and DDP's buckets, which hold the gradients once more.
        assert rank["ddp"]["live_bytes"] == pytest.approx(16 * rank["num_parameters"], rel=0.01)


def test_fsdp_gathers_twice_and_scatters_once_a_step(ranks: list[dict[str, Any]]) -> None:
    size = len(ranks)
    for rank in ranks:
        bytes_ = 4 * rank["num_parameters"] * STEPS
        counts = rank["fsdp"]["counts"]
        assert counts.keys() == {"all_gather", "reduce_scatter"}
        assert counts["all_gather"]["payload_bytes"] == 2 * bytes_
        assert counts["reduce_scatter"]["payload_bytes"] == bytes_
        sent = counts["all_gather"]["sent_bytes"] + counts["reduce_scatter"]["sent_bytes"]
        assert sent == pytest.approx(4 * (size - 1) / size * bytes_)
        theory = 12 * rank["num_parameters"] / size
        assert rank["fsdp"]["live_bytes"] == pytest.approx(theory, rel=0.02)


def test_each_collective_is_counted_by_its_name_and_payload(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, measured in rank["ops"].items():
            counted = measured["counts"]
            assert counted.keys() == ({"send", "recv"} if name == "send" else {name})
            assert all(count["calls"] == 1 for count in counted.values())
            assert all(count["payload_bytes"] == LARGE for count in counted.values())
        assert rank["ops"]["send"]["counts"]["send"]["sent_bytes"] == LARGE
        assert rank["ops"]["send"]["counts"]["recv"]["sent_bytes"] == 0


def test_sent_bytes_agree_with_the_sockets(ranks: list[dict[str, Any]]) -> None:
    if ranks[0]["ops"]["all_reduce"]["tcp"] is None:
        pytest.skip("this system does not give TCP_INFO")
    for name in ranks[0]["ops"]:
        measured = [rank["ops"][name] for rank in ranks]
        # Rooted ones are given as the mean over the group, so the group is what is compared.
        sent = sum(count["sent_bytes"] for one in measured for count in one["counts"].values())
        assert sum(one["tcp"] for one in measured) == pytest.approx(sent, rel=0.05), name
    for rank in ranks:
        one = rank["ops"]["all_reduce"]
        assert one["tcp"] == pytest.approx(one["counts"]["all_reduce"]["sent_bytes"], rel=0.05)


def test_objects_single_groups_and_calls_below_autograd_are_counted(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["objects"]["counts"]["broadcast"]["calls"] == 2  # the length, then the bytes
        alone = rank["alone"]["counts"]["all_reduce"]
        assert (alone["calls"], alone["payload_bytes"], alone["sent_bytes"]) == (1, 16, 0)
        assert rank["hidden"]["counts"]["all_reduce"]["calls"] == 1
        assert rank["hidden"]["counts"]["all_gather"]["payload_bytes"] == 4 * 256 * 512


def test_a_stopped_counter_counts_nothing(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["windows"] == {"window": 1, "pause": 1, "again": 2, "barrier_bytes": 0}


def test_a_writer_exchanges_while_counters_start_and_stop(ranks: list[dict[str, Any]]) -> None:
    """torch's dispatcher takes no lock where one thread changes the kernels that another calls."""
    for rank in ranks:
        table = [[[other, n] for other in range(len(ranks))] for n in range(EXCHANGES)]
        assert rank["beside"] == {"exchanged": table, "counted": []}


def test_only_one_counter_can_be_started() -> None:
    counter = CollectiveCounter()
    with pytest.raises(RuntimeError, match="not started"):
        counter.stop()
    counter.start()
    try:
        with pytest.raises(RuntimeError, match="already"):
            CollectiveCounter().start()
    finally:
        counter.stop()
    other = CollectiveCounter()
    other.start()
    other.stop()


@pytest.fixture
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A sender and its receiver, whose sockets of TCP have sent nothing."""
    if tcp_bytes_sent() is None:
        pytest.skip("this system does not give TCP_INFO")
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
        with sender, receiver:
            yield sender, receiver


def test_tcp_counts_each_socket_of_this_process_once(
    connected: tuple[socket.socket, socket.socket],
) -> None:
    (sender, receiver), before = connected, tcp_bytes_sent()
    assert before is not None
    with sender.dup():
        sender.sendall(bytes(10_000))
        assert len(receiver.recv(10_000, socket.MSG_WAITALL)) == 10_000
        assert tcp_bytes_sent() == before + 10_000


def test_tcp_counts_what_waits_for_a_receiver_that_is_late(
    connected: tuple[socket.socket, socket.socket],
) -> None:
    """The bytes of one step would else count as the next one's, on a host that is busy."""
    (sender, _), before = connected, tcp_bytes_sent()
    assert before is not None
    sender.setblocking(False)
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            taken += sender.send(bytes(1_000_000))
    assert tcp_bytes_sent() == before + taken
