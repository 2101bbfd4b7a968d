"""A first layer may change its input in place: it is the same run as with a copy of the input."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hybrid
from hybrid.job.errors import RunError
from hybrid.training.check import look_at_job
from tests.conftest import small_job


class Scaled(nn.Module):
    """Shifts and scales its input, by numbers that are trained."""

    def __init__(self, width: int, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.scale = nn.Parameter(torch.linspace(0.5, 0.9, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to [batch, width]."""
        x = x if self.in_place else x.clone()
        return x.sub_(0.3).mul_(self.scale)


class Halved(nn.Module):
    """Halves its input, which autograd does not need, and maps it."""

    def __init__(self, width: int, in_place: bool) -> None:
        super().__init__()
        self.in_place, self.inner = in_place, nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to [batch, width]."""
        x = x if self.in_place else x.clone()
        with torch.no_grad():
            x.mul_(0.5)
        return self.inner(x)


def summed(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A loss that does not tell its count before it has seen an output."""
    return F.cross_entropy(output, target, reduction="sum"), len(target)


def shifted(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A loss that changes its target in place, and does the same to one that it changed before."""
    return F.cross_entropy(output, target.add_(1).remainder_(10), reduction="sum"), len(target)


def shifted_copy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same with a copy."""
    return shifted(output, target.clone())


def shifting(in_place: bool) -> tuple[list[nn.Module], Any]:
    return [nn.Linear(32, 20), nn.Linear(20, 10)], shifted if in_place else shifted_copy


def doubled(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A loss that changes the model's output in place."""
    return summed(output.mul_(2), target)


def doubled_copy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The same with a copy."""
    return doubled(output.clone(), target)


def doubling(in_place: bool) -> tuple[list[nn.Module], Any]:
    return [nn.Linear(32, 20), nn.Linear(20, 10)], doubled if in_place else doubled_copy


def hits(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A metric, of the targets as the data has them."""
    return (output.argmax(1) == target).sum(), len(target)


def changing(in_place: bool) -> tuple[list[nn.Module], Any]:
    """Five layers, 32 numbers in, 10 out."""
    rest = [nn.Sequential(nn.Tanh(), nn.Linear(32, 20)), nn.Linear(20, 20), nn.Linear(20, 10)]
    return [Scaled(32, in_place), Halved(32, in_place), *rest], summed


def halving(in_place: bool) -> tuple[list[nn.Module], Any]:
    """The first layer's change is not seen by autograd, which would name it."""
    return [Halved(32, in_place), nn.Tanh(), nn.Linear(32, 10)], summed


def job(name: str, in_place: bool, **changes: Any) -> hybrid.Job:
    model = {"name": f"{__name__}:{name}", "options": {"in_place": in_place}}
    return small_job(model=model, **changes)


def losses(name: str, in_place: bool, **changes: Any) -> list[float]:
    return [step.loss for step in hybrid.train(job(name, in_place, **changes), "single").steps]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", ["changing", "halving", "shifting", "doubling"])
def test_a_run_is_that_with_copies(name: str, recomputed: bool) -> None:
    found = losses(name, True, train__activation_checkpointing=recomputed)
    assert found == losses(name, False)


def test_metrics_take_the_targets_that_the_data_has() -> None:
    found = []
    for in_place in (True, False):
        asked = job("shifting", in_place, train__metrics=[f"{__name__}:hits"])
        record = hybrid.train(asked, "single")
        assert record.eval
        found.append(record.eval.metrics)
    assert found[0] == found[1]


@pytest.mark.slow
def test_ranks_compute_what_one_process_does_with_copies(tmp_path: Path) -> None:
    expected = losses("changing", False)
    for engine in ("deepspeed", "torch"):
        asked = job("changing", True, strategy__pipeline={"engine": engine, "micro_batches": 4})
        names = ["ddp", "zero3", "pipeline"] if engine == "deepspeed" else ["pipeline"]
        result = hybrid.compare(asked, names, nproc=4, out=tmp_path / engine)
        assert result.ok, {n: p.first_difference for n, p in result.parity.items()}
        for record in result.strategies.values():
            assert record.status == "ok", record.reason
            assert [step.loss for step in record.steps] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["changing", "shifting", "doubling"])
def test_it_is_not_taken_for_a_state_of_the_model(name: str) -> None:
    assert look_at_job(job(name, True)).findings == look_at_job(job(name, False)).findings


class Root(nn.Module):
    """Takes the square root of its input in place, and then of less than nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width] to [batch, width]."""
        return x.sqrt_().sub_(2.0)


def rooted() -> tuple[list[nn.Module], Any]:
    return [Root(), nn.Linear(8, 3)], summed


def one_below_zero(bad: int) -> tuple[list[Any], list[Any]]:
    """Samples of positive numbers but for one."""
    numbers = torch.linspace(0.1, 0.9, 29 * 8).reshape(29, 8)
    numbers[bad, 5] = -1.0
    samples = [(row, i % 3) for i, row in enumerate(numbers)]
    return samples, samples[:7]


def test_the_guard_names_the_sample_all_the_same() -> None:
    bad = random.randrange(8, 29)  # the first ones are tried before a run
    asked = small_job(
        model={"name": f"{__name__}:rooted"},
        data={"name": f"{__name__}:one_below_zero", "options": {"bad": bad}},
        train={"global_batch": 7, "micro_batches": 2, "epochs": 1},
        guard={},
    )
    with pytest.raises(RunError, match=rf"sample {bad}\b(?!,)"):
        hybrid.train(asked, "single")
