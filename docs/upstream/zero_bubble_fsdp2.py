"""Zero-bubble schedules over FSDP2 give wrong gradients, without an error. It needs torch alone.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 4 zero_bubble_fsdp2.py

Two pipeline ranks of two stages each, times two data-parallel ranks, on CPUs with gloo. Each stage
has two layers under `fully_shard`. After one step, every gradient is compared with that of the
whole model in one process.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, stage
from torch.distributed.pipelining.schedules import get_schedule_class

WIDTH, LAYERS, BATCH, MICRO_BATCHES = 16, 8, 16, 4
FLAT = ("Interleaved1F1B", "InterleavedZeroBubble")  # the others place their stages in a V
SCHEDULES = (*FLAT, "ZBVZeroBubble", "DualPipeV")


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, WIDTH] to the same shape."""
        return x + torch.tanh(self.inner(x))


def make_layers() -> list[Layer]:
    """The whole model, equal on all ranks."""
    torch.manual_seed(0)
    return [Layer() for _ in range(LAYERS)]


def run(name: str, reshard: bool, unshard_first: bool) -> None:
    """Take one step under a schedule, and print on rank 0 how many gradients are wrong.

    unshard_first: gather each stage's parameters before its backward pass looks at them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    here, column = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    numbers = [here, here + 2] if name in FLAT else [here, 3 - here]
    layers, parts = make_layers(), []
    for number in numbers:
        part = nn.Sequential(*layers[2 * number : 2 * number + 2])
        for layer in part:
            fully_shard(layer, mesh=mesh["dp"], reshard_after_forward=reshard)
        parts.append(fully_shard(part, mesh=mesh["dp"], reshard_after_forward=reshard))
    group, cpu = mesh.get_group("pp"), torch.device("cpu")
    stages = [PipelineStage(p, n, 4, cpu, group=group) for p, n in zip(parts, numbers, strict=True)]
    schedule = get_schedule_class(name)(stages, MICRO_BATCHES, loss_fn=nn.functional.mse_loss)

    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(BATCH, WIDTH, generator=draw), torch.randn(BATCH, WIDTH, generator=draw)
    whole = make_layers()
    nn.functional.mse_loss(nn.Sequential(*whole)(x), y).backward()
    share = slice(column * BATCH // 2, (column + 1) * BATCH // 2)
    original = stage._PipelineStageBase.backward_maybe_with_nosync
    if unshard_first:
        stage._PipelineStageBase.backward_maybe_with_nosync = gather_first(original)
    try:
        schedule.step(*([x[share]] if 0 in numbers else []), target=y[share], losses=[])
    finally:
        stage._PipelineStageBase.backward_maybe_with_nosync = original

    counts = torch.zeros(3, dtype=torch.int64)  # all, wrong, of these None
    for part, number in zip(parts, numbers, strict=True):
        for layer, right in zip(part, whole[2 * number : 2 * number + 2], strict=True):
            for got, wanted in zip(layer.parameters(), right.parameters(), strict=True):
                full = None if got.grad is None else got.grad.full_tensor()
                wrong = full is None or not torch.allclose(full, wanted.grad, 1e-4, 1e-7)
                counts += torch.tensor([1, wrong, full is None])
    dist.all_reduce(counts, group=group)
    if dist.get_rank() == 0:
        every, wrong, missing = counts.tolist()
        mended = ", unsharded before backward" if unshard_first else ""
        print(
            f"{name}, reshard_after_forward={reshard}{mended}: "
            f"{wrong} of {every} gradients wrong, {missing} of them None",
            flush=True,
        )


def gather_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """`backward_maybe_with_nosync` after an unshard of all that the stage holds."""

    def gathered(self: Any, *arguments: Any, **options: Any) -> Any:
        for module in self.submod.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
        return original(self, *arguments, **options)

    return gathered


if __name__ == "__main__":
    dist.init_process_group("gloo")
    if dist.get_rank() == 0:
        print(f"torch {torch.__version__}")
    for name in SCHEDULES:
        for reshard, unshard_first in ((False, False), (True, False), (True, True)):
            run(name, reshard, unshard_first)
    dist.barrier()
    dist.destroy_process_group()
