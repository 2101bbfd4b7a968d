"""The gradients' norm under ZeRO: it is taken in those steps that need it, and changes no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybrid.job.errors import RunFailed
from hybrid.models.losses import cross_entropy
from hybrid.records import Record
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import small_job

STRATEGIES = ("zero1", "zero2", "zero3", "2d")
STEPS = 9
BROKEN_STEP = 3  # in which gradients are infinite, from 0


def run(strategy: str, out: Path, **changes: Any) -> Record:
    return launch(small_job(train__steps=STEPS, **changes), strategy, 4, out, Watcher())


def reductions(record: Record) -> float:
    """The all-reduces of a step on all ranks together."""
    assert record.comm is not None
    found = record.comm.by_op.get("all_reduce")
    return sum(found["calls"]) if found else 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_steps_between_logged_ones_take_no_norm(strategy: str, tmp_path: Path) -> None:
    each = run(strategy, tmp_path / "each")
    some = run(strategy, tmp_path / "some", log__every=4)
    assert [s.loss for s in some.steps] == [s.loss for s in each.steps]
    assert some.eval == each.eval
    logged = (0, 3, 7, 8)
    norms = [s.grad_norm if i in logged else None for i, s in enumerate(each.steps)]
    assert [s.grad_norm for s in some.steps] == norms
    assert all(norms[i] for i in logged)
    assert reductions(some) < reductions(each)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_clipped_step_takes_its_norm(strategy: str, tmp_path: Path) -> None:
    each = run(strategy, tmp_path / "each", train__clip_norm=0.05)
    some = run(strategy, tmp_path / "some", train__clip_norm=0.05, log__every=4)
    assert [s.loss for s in some.steps] == [s.loss for s in each.steps]
    assert all(s.grad_norm and s.grad_norm > 0.05 for s in some.steps)


class _Break(torch.autograd.Function):
    """Passes its input on, and an infinite gradient back."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * torch.inf


class Breaks(nn.Linear):
    """Has infinite gradients in one step of its training."""

    passes = 0

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes += 1
        breaks = self.training and self.passes == BROKEN_STEP + 1
        return super().forward(_Break.apply(value) if breaks else value)


def breaking() -> tuple[list[nn.Module], Callable[..., Any]]:
    """The small job's model, which breaks."""
    return [nn.Sequential(nn.Linear(32, 24), nn.Tanh()), Breaks(24, 10)], cross_entropy


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("every", [1, 50])
def test_infinite_gradients_end_a_run(strategy: str, every: int, tmp_path: Path) -> None:
    """Where no norm is taken, the next loss tells, under every strategy."""
    with pytest.raises(RunFailed, match=f"step {BROKEN_STEP + (every > 1)}"):
        run(
            strategy,
            tmp_path,
            log__every=every,
            train__micro_batches=1,
            model={"name": f"{__name__}:breaking"},
        )
