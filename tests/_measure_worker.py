"""One rank of the processes that test_measure.py starts: communicates in known ways and writes what
the instruments say about each to OUT/RANK.json.

    _measure_worker.py OUT     (ranks by the usual variables)
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hybrid.checkpoint.writer import Writer
from hybrid.launch.placement import find_placement
from hybrid.launch.process_group import join_process_group
from hybrid.measure.memory import StorageMeter
from hybrid.measure.traffic import CollectiveCounter, tcp_bytes_sent

STEPS = 3
EXCHANGES = 20
LARGE = 4_000_000  # bytes, so that what TCP and gloo add around them is small


def build_model() -> nn.Sequential:
    # Every first dimension divides by 4, so that FSDP2 pads nothing.
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 256))


def count(call: Callable[[], Any]) -> dict[str, Any]:
    """Counts a call by name, and what the sockets sent meanwhile as `tcp`."""
    counter = CollectiveCounter()
    dist.barrier()
    before = tcp_bytes_sent()
    counter.start()
    call()
    counter.stop()
    dist.barrier()
    after = tcp_bytes_sent()
    counts = {name: dataclasses.asdict(value) for name, value in counter.counts().items()}
    tcp = None if before is None or after is None else after - before
    return {"counts": counts, "tcp": tcp}


def train(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    """AdamW under a wrapper: memory from before the model exists, collectives of later steps."""
    meter = StorageMeter()
    with meter:
        torch.manual_seed(0)
        model = wrap(build_model())
        optimizer = torch.optim.AdamW(model.parameters())
        inputs = torch.ones(2, 256)

        def steps() -> None:
            for _ in range(STEPS):
                model(inputs).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        # DDP regroups its buckets after the first step and says so to all ranks.
        steps()
        result = count(steps)
    return {**result, "live_bytes": meter.live_bytes, "peak_bytes": meter.peak_bytes}


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def exchange_around(tensor: torch.Tensor) -> None:
    """Sends to the next rank and receives from the one before, as pipeline stages do."""
    rank, size = dist.get_rank(), dist.get_world_size()
    pending = dist.isend(tensor, (rank + 1) % size)
    dist.recv(torch.empty_like(tensor), (rank - 1) % size)
    assert pending is not None
    pending.wait()


def collectives() -> dict[str, Callable[[], Any]]:
    """Each collective with a payload of LARGE bytes, under the name that it is to be counted by."""
    size, root = dist.get_world_size(), dist.get_rank() == 0
    full = torch.ones(LARGE // 4)
    part = torch.ones(LARGE // 4 // size)
    parts = [torch.empty_like(part) for _ in range(size)]
    return {
        "all_reduce": lambda: dist.all_reduce(full),
        "all_gather": lambda: dist.all_gather(parts, part),
        "reduce_scatter": lambda: dist.reduce_scatter(part, list(full.chunk(size))),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(full), full),
        "broadcast": lambda: dist.broadcast(full, 0),
        "reduce": lambda: dist.reduce(full, 0),
        "gather": lambda: dist.gather(part, parts if root else None, 0),
        "scatter": lambda: dist.scatter(part, parts if root else None, 0),
        "send": lambda: exchange_around(full),
    }


def hidden_calls() -> None:
    """Where the autograd keys are left out: inference mode, and a functional collective."""
    with torch.inference_mode():
        dist.all_reduce(torch.ones(4))
    weight = next(shard(build_model()).parameters())
    assert isinstance(weight, DTensor)
    weight.full_tensor()


def windows() -> dict[str, int]:
    """The calls counted after each of: a window, a pause, a second window with a barrier."""
    counter, calls = CollectiveCounter(), {}
    tensor = torch.ones(4)

    def note(name: str) -> None:
        calls[name] = counter.counts()["all_reduce"].calls

    counter.start()
    dist.all_reduce(tensor)
    counter.stop()
    note("window")
    dist.all_reduce(tensor)
    note("pause")
    counter.start()
    dist.all_reduce(tensor)
    dist.barrier()
    counter.stop()
    note("again")
    return {**calls, "barrier_bytes": counter.counts()["barrier"].payload_bytes}


def counted_beside_a_save() -> dict[str, Any]:
    """What a writer exchanged while counters were started and stopped, and what they counted."""
    writer, exchanged, counted = Writer(dist.get_world_size(), 20), list[Any](), set[str]()

    def exchange() -> None:
        for number in range(EXCHANGES):
            exchanged.append(writer.gather([dist.get_rank(), number]))

    writer.start(exchange)
    while len(exchanged) < EXCHANGES:
        counter = CollectiveCounter()
        counter.start()
        time.sleep(0)  # lets the thread call
        counter.stop()
        writer.take(wait=False)  # raises what has failed
        counted |= counter.counts().keys()
    return {"exchanged": exchanged, "counted": sorted(counted)}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    join_process_group(find_placement())
    rank = dist.get_rank()
    for call in collectives().values():
        call()  # gloo connects pairs at their first use
    alone = [dist.new_group([other]) for other in range(dist.get_world_size())][rank]
    result = {
        "num_parameters": sum(parameter.numel() for parameter in build_model().parameters()),
        "ops": {name: count(call) for name, call in collectives().items()},
        "objects": count(lambda: dist.broadcast_object_list([rank], src=0)),
        "alone": count(lambda: dist.all_reduce(torch.ones(4), group=alone)),
        "hidden": count(hidden_calls),
        "windows": windows(),
        "beside": counted_beside_a_save(),
        "ddp": train(DistributedDataParallel),
        "fsdp": train(shard),
    }
    (out / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    # Without the interpreter's teardown, in which gloo's threads can abort a finished process.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
