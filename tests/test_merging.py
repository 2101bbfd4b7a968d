"""Local SGD's merges: the mean, how far replicas were apart, and what the ranks send for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.engines import merging
from hybrid.engines.base import BaseEngine
from hybrid.engines.merging import Replica, merge
from hybrid.job.errors import RunError
from hybrid.models.losses import cross_entropy
from hybrid.records import Record
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import small_job

ELEMENTS = 32 * 24 + 24 + 24 * 16 + 16 + 16 * 12 + 12 + 12 * 10 + 10  # of the small job's model
UNEVEN = {"train__global_batch": 10, "train__micro_batches": 1}  # 3, 3, 2 and 2 samples on 4 ranks


def replicas(num: int = 3, masked: bool = False) -> list[nn.Sequential]:
    """Replicas with other values each; the middle layer is frozen, and alike in all."""
    torch.manual_seed(0)
    models = []
    for _ in range(num):
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 301), nn.BatchNorm1d(301))
        model.append(nn.Linear(301, 3, bias=False))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape))
        if masked:
            model.register_buffer("mask", torch.tensor([0.5, -math.inf, 1.5]))
        models.append(model)
    for model in models:
        model[1].requires_grad_(False).load_state_dict(models[0][1].state_dict())
    return models


def floats(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t.double() for k, t in model.state_dict().items() if t.is_floating_point()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("drifts", [False, True])
@pytest.mark.parametrize("least", [1, 2**18])
def test_replicas_become_their_weighted_mean(
    masked: bool, drifts: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "LEAST", least)
    models, weights = replicas(masked=masked), [0.0, 1.75, 1.25]
    before = [floats(model) for model in models]
    held = [Replica(model) for model in models]
    for model, values in zip(models, before, strict=True):  # moving them changes nothing
        assert all(torch.equal(tensor, values[name]) for name, tensor in floats(model).items())
    found = merge(held, weights, not masked, drifts)
    square, apart = 0.0, [0.0] * len(models)
    for name, first in before[0].items():
        finite = first.isfinite()
        terms = [w * each[name] for w, each in zip(weights, before, strict=True)]
        terms = [torch.where(finite, term, first) for term in terms]  # 0 * -inf is nan
        mean = torch.stack(terms).sum(0) / len(models)
        for model in models:
            assert torch.allclose(floats(model)[name], mean, rtol=0, atol=1e-6), name
        square += float(mean[finite].square().sum())
        for k, each in enumerate(before):
            apart[k] += float((each[name] - mean)[finite].square().sum())
    assert (found is not None) == drifts
    if found is not None:
        assert found.tolist() == pytest.approx([math.sqrt(a / square) for a in apart], rel=1e-5)


@pytest.mark.parametrize(("frozen", "collectives"), [(False, 1), (True, 2)])
def test_a_merge_takes_no_more_memory_than_gradients(
    frozen: bool, collectives: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is trained whole is merged at once, one with a large frozen part is not."""
    monkeypatch.setattr(merging, "LEAST", 1)
    models = replicas(2)
    for model in models:
        model.requires_grad_(True)[1].requires_grad_(not frozen)
    sizes: list[int] = []
    take = merging._average

    def watched(first: torch.Tensor, *rest: Any) -> None:
        sizes.append(first.numel())
        take(first, *rest)

    monkeypatch.setattr(merging, "_average", watched)
    merge([Replica(model) for model in models], [1.0, 1.0], True, False)
    buffers = [t for t in models[0].buffers() if t.is_floating_point()]
    trained = [p for p in models[0].parameters() if p.requires_grad]
    assert len(sizes) == collectives
    assert max(sizes) <= sum(t.numel() for t in [*trained, *buffers])


class Odd(nn.Module):
    """Has what cannot lie in one piece of memory with the rest."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.whole = nn.Parameter(torch.randn(3, 5))
        self.turned = nn.Parameter(torch.randn(5, 3).t())
        both = torch.randn(7)
        self.left, self.right = nn.Parameter(both[:3]), nn.Parameter(both[3:])
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("first", self.mean[:1])  # of the same memory
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("unset", None)


def test_tensors_may_share_memory_and_be_replaced() -> None:
    models: list[Any] = [Odd(1), Odd(2)]
    held = [Replica(model) for model in models]
    assert all(model.turned.stride() == (1, 3) for model in models)
    for model in models:
        model.mean = torch.randn(3)  # as a model does that assigns its running statistics
        model.whole.data = model.whole.data * 2  # which it should not do, but may
        model.unset = torch.randn(2)
    befores = [floats(model) for model in models]
    merge(held, [0.5, 1.5], True, False)
    for name in ("whole", "turned", "left", "right", "wide", "mean", "unset"):
        mean = 0.25 * befores[0][name] + 0.75 * befores[1][name]
        for model in models:
            assert torch.allclose(floats(model)[name], mean, rtol=0, atol=1e-6), name
    assert [int(model.count) for model in models] == [1, 2]
    left, right = models[0].left, models[0].right  # which still are halves of one tensor
    assert left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def test_a_model_s_parameters_are_merged_where_they_lie() -> None:
    model = nn.Sequential(nn.Linear(7, 4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    replica = Replica(model)
    flat, merged = replica.flats[torch.float32], replica.gather()
    assert flat.numel() == sum(t.numel() for t in floats(model).values())
    assert [piece.data_ptr() for piece in merged] == [flat.data_ptr()]
    for parameter in model.parameters():
        assert parameter.untyped_storage().data_ptr() == flat.data_ptr()
        if parameter.numel() % 4 == 0:
            assert (parameter.data_ptr() - flat.data_ptr()) % 16 == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 7)).square().sum().backward()
    before = flat.clone()
    optimizer.step()
    assert not torch.equal(before, flat)


def run(out: Path, **changes: Any) -> Record:
    """Local SGD on four ranks, without the checks of a comparison."""
    return launch(small_job(**changes), "local_sgd", 4, out, Watcher())


def evidence(record: Record) -> dict[str, Any]:
    assert record.receipt is not None
    return record.receipt.evidence


def test_between_logged_steps_nothing_but_the_mean_is_sent(tmp_path: Path) -> None:
    settings = {"strategy__local_sgd": {"sync_every": 1}, "log__every": 50, "train__steps": 9}
    record = run(tmp_path, **settings, **UNEVEN)
    assert record.comm is not None
    found = {op: (each["calls"], each["payload_bytes"]) for op, each in record.comm.by_op.items()}
    assert found == {"all_reduce": ([1.0] * 4, [4.0 * ELEMENTS] * 4)}


def test_drift_is_taken_where_steps_are_logged(tmp_path: Path) -> None:
    settings = {"strategy__local_sgd": {"sync_every": 2}, "log__every": 5, "train__steps": 11}
    record = run(tmp_path, **settings)
    assert [one["step"] for one in record.drift or []] == [1, 5, 9, 10]
    assert evidence(record)["merges"] == 6


def told_sometimes() -> tuple[list[nn.Module], Callable[..., Any]]:
    """The small job's model, in a rank whose loop keeps the samples of some steps to itself."""
    start = BaseEngine.start_step

    def kept(self: Any, batches: Any, count: Any = None, samples: Any = None) -> None:
        start(self, batches, count, samples if self.step % 4 else None)

    BaseEngine.start_step = kept  # type: ignore[method-assign]
    return mlp(), cross_entropy


def always_told() -> tuple[list[nn.Module], Callable[..., Any]]:
    """The same, in the loop as it is."""
    return mlp(), cross_entropy


def mlp() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(32, 24), nn.Tanh()), nn.Linear(24, 10)]


def test_ranks_ask_one_another_where_they_are_not_told(tmp_path: Path) -> None:
    """Their shares differ, so other weights would give other losses."""
    settings = {"strategy__local_sgd": {"sync_every": 3}, "train__steps": 13, **UNEVEN}
    runs = [
        run(tmp_path / name, **settings, model={"name": f"{__name__}:{name}"})
        for name in ("always_told", "told_sometimes")
    ]
    losses = [[step.loss for step in record.steps] for record in runs]
    assert losses[0] == losses[1] and len(set(losses[0])) == 13
    assert [evidence(record)["drift"] for record in runs] == [runs[0].drift] * 2


def test_other_samples_than_announced_end_a_run() -> None:
    inputs, targets = torch.randn(5, 8), torch.randint(3, (5,))
    batches = [hybrid.MicroBatch(inputs, targets, torch.arange(5))]
    settings = {"strategy__local_sgd": {"sync_every": 2}}
    job = small_job(model__name="own", data__name="own", **settings)
    engine = hybrid.open_engine(job, "local_sgd", [nn.Linear(8, 3)], cross_entropy)
    try:
        engine.start_step(batches, samples=5)
        assert engine.results()[0].samples == 5
        engine.start_step(batches, samples=6)
        with pytest.raises(RunError, match="the ranks had 5 samples, and 6 were announced"):
            engine.results()
    finally:
        hybrid.cleanup()
