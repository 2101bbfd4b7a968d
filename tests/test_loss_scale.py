"""fp16's loss scale: an overflow halves it and skips the step, and it changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.data.batches import BatchPlan
from hybrid.data.loader import load_micro_batch
from hybrid.engines import optimizer
from hybrid.engines.precision import DTYPES
from hybrid.job.errors import RunError
from hybrid.models import build_model
from tests.test_precision import gpt_job
from tests.workloads import points


class Steep(nn.Linear):
    """A layer whose output, and so whose gradient, is 200 times larger than a plain one's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 12] to [batch, 3]."""
        return super().forward(x) * 200


def steep() -> tuple[list[nn.Module], Any]:
    """A model whose scaled gradients overflow fp16 at first."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
        return (output.float() - target).abs().sum(), target.numel()

    return [nn.Linear(12, 12), Steep(12, 3)], loss


def steep_job(**changes: Any) -> hybrid.Job:
    own = {
        "model": {"name": "tests.test_loss_scale:steep"},
        "data": {"name": "tests.workloads:points"},
        "optimizer": {"name": "adamw", "lr": 1e-4},
    }
    settings = {"train__precision": "fp16", "train__steps": 8, "schedule": {"warmup_steps": 8}}
    return gpt_job(**(own | settings | changes))


def test_an_overflow_halves_the_scale_and_skips_the_step() -> None:
    record = hybrid.train(steep_job(), "single")
    skipped = [step.skipped for step in record.steps]
    count = sum(skipped)
    assert 1 < count < 8 and skipped == [True] * count + [False] * (8 - count)
    scales = [step.loss_scale for step in record.steps]
    assert scales == [2.0**16 / 2 ** min(i, count) for i in range(8)]
    assert [step.grad_norm is None for step in record.steps] == skipped
    assert [step.lr for step in record.steps] == pytest.approx([1e-4 * i / 8 for i in range(1, 9)])
    exact = hybrid.train(steep_job(train__precision="fp32"), "single").steps
    # The norm is of gradients without the scale, and as large as those of fp32.
    first = record.steps[count]
    assert first.grad_norm == pytest.approx(exact[0].grad_norm, rel=0.2)


def test_a_skipped_step_changes_no_weight_and_no_state() -> None:
    job = steep_job()
    layers, loss = build_model(job)
    engine = hybrid.open_engine(job, "single", layers, loss)
    samples, _ = points()
    plan = BatchPlan(len(samples), 8, 1, 2, seed=0)
    seen = []
    for step in range(8):
        before = engine.state()
        batches = [load_micro_batch(samples, ids) for ids in plan.micro_batch_ids(step, 0)]
        result = engine.train_step(batches)
        after = engine.state()
        same = {torch.equal(after[name], before[name]) for name in before}
        seen.append(result.skipped)
        assert same == {result.skipped}, step
        assert all(bool(t.isfinite().all()) for t in after.values())
    assert seen[0] and not seen[-1]
    (optimizer,) = engine.optimizers  # type: ignore[attr-defined]
    steps = {float(state["step"]) for state in optimizer.state.values()}
    assert steps == {float(seen.count(False))}, "AdamW counted a step that was skipped"
    engine.close()


def test_the_scale_doubles_after_steps_without_an_overflow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer, "GROWTH_STEPS", 2)
    monkeypatch.setattr(optimizer, "INITIAL_SCALE", 2.0**8)
    record = hybrid.train(gpt_job(train__precision="fp16", train__steps=6), "single")
    assert [step.loss_scale for step in record.steps] == [2.0**8] * 2 + [2.0**9] * 2 + [2.0**10] * 2
    assert not any(step.skipped for step in record.steps)


def test_the_scale_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = hybrid.train(gpt_job(train__precision="fp16", train__clip_norm=0.1), "single")
    monkeypatch.setattr(optimizer, "INITIAL_SCALE", 2.0**12)
    other = hybrid.train(gpt_job(train__precision="fp16", train__clip_norm=0.1), "single")
    for a, b in zip(usual.steps, other.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)
        assert a.grad_norm is not None and a.grad_norm > 0.1, "clipping had nothing to do"


@pytest.mark.parametrize("precision", DTYPES)
def test_a_loss_that_is_not_finite_ends_the_run(precision: str) -> None:
    """No scale of gradients mends it: it is not one of fp16's skipped steps."""
    wild = {"name": "sgd", "lr": 1e30}
    job = steep_job(train__precision=precision, optimizer=wild, train__steps=16)
    with pytest.raises(RunError, match=r"loss (inf|nan).*: not finite"):
        hybrid.train(job, "single")
