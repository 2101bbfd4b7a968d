"""torch's pipelines receive a gradient into memory with gaps, which gloo refuses.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 pipelining_gradient.py

It needs torch alone, and runs on CPUs with gloo. The first of two stages passes on two tensors. The
second joins them by `torch.cat`, whose gradient is a part of one tensor for each of them: its rows
do not lie in one piece. Where they are added the same stages train.
"""

import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

ROWS, WIDTH = 4, 6


class First(nn.Module):
    """[rows, width] to two tensors of that shape."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.other(x)


class Second(nn.Module):
    """Two tensors [rows, width] to [rows, 1]."""

    def __init__(self, joins: bool) -> None:
        super().__init__()
        self.joins = joins
        self.last = nn.Linear((1 + joins) * WIDTH, 1)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([one, other], 1) if self.joins else one + other)


def train(joins: bool) -> str:
    """Take the gradients of two micro-batches; return what was raised."""
    rank = dist.get_rank()
    stage = PipelineStage(Second(joins) if rank else First(), rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)
    batch, targets = torch.randn(2 * ROWS, WIDTH), torch.randn(2 * ROWS, 1)
    try:
        schedule.step(target=targets) if rank else schedule.step(batch)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "no error"


dist.init_process_group("gloo")
if dist.get_rank() == 0:
    print(f"torch {torch.__version__}")
for words, joins in (("added", False), ("joined", True)):
    found = train(joins)
    if dist.get_rank() == 0:
        print(f"the first stage, where its tensors are {words}: {found}", flush=True)
        sys.stdout.flush()
time.sleep(1)  # the other rank waits for a message that nobody sends, and is ended by torchrun
