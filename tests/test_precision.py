"""One meaning of `train.precision`: what a run holds and computes in, what is refused, and fp16's
loss scale. The strategies that take several processes are in test_language.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization

import hybrid
from hybrid.data.batches import BatchPlan
from hybrid.data.loader import load_micro_batch
from hybrid.engines import optimizer, replicas
from hybrid.engines.precision import DTYPES, check_ledger, plain_names, round_at_use, round_inputs
from hybrid.engines.state import named_tensors
from hybrid.job.errors import RunError
from hybrid.models import build_model
from hybrid.models.layers import Layers
from hybrid.models.losses import cross_entropy
from tests.workloads import points

LOW = ["bf16", "fp16"]
GPT = {"num_layers": 2, "width": 16, "num_heads": 2, "context": 16, "vocab_size": 61}


def gpt_job(**changes: Any) -> hybrid.Job:
    """A small GPT on 60 sentences, AdamW, 3 steps."""
    sections = {
        "model": {"name": "gpt", "options": GPT},
        "data": {"name": "tests.workloads:sentences"},
        "optimizer": {"name": "adamw", "lr": 0.003},
        "train": {"global_batch": 8, "micro_batches": 2, "steps": 3},
    }
    return hybrid.load_job(sections, {k.replace("__", "."): v for k, v in changes.items()})


def rounded(dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The GPT under `round_at_use`, and what its parameters were before, by name."""
    layers, _ = build_model(gpt_job())
    model = layers.whole()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    round_at_use(model, dtype)
    return model, before


@pytest.mark.parametrize("precision", LOW)
def test_parameters_stay_fp32_and_are_rounded_where_they_are_used(precision: str) -> None:
    dtype = DTYPES[precision]
    model, before = rounded(dtype)
    after = named_tensors(model)
    after = {name: after[name] for name in before}
    assert len(after) == len(list(model.parameters()))
    assert after.keys() == before.keys(), "names, or a tie, did not stay"
    for name, parameter in after.items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
        module, _, own = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(module), own), before[name].to(dtype))
    assert model[-1].logits.weight.dtype == dtype
    assert after["0.token.weight"] is model[-1].logits.parametrizations.weight.original
    ids = torch.arange(16)[None]
    whole = build_model(gpt_job())[0].whole().to(dtype)
    for block in whole[1:3]:  # `to` rounds buffers too, which is not meant
        block.attention.inverse_frequency = model[1].attention.inverse_frequency
    assert model(ids).dtype == dtype and torch.equal(model(ids), whole(ids))


@pytest.mark.parametrize("precision", LOW)
def test_gradients_are_fp32_and_sum_in_fp32(precision: str) -> None:
    dtype = DTYPES[precision]
    model = nn.Linear(3, 1, bias=False)
    round_at_use(model, dtype)
    (weight,) = model.parameters()
    small = 2.0**-12  # lost beside 1 in bf16 and in fp16
    for size in (1.0, small, small):
        model(torch.full((1, 3), size, dtype=dtype)).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, torch.full((1, 3), 1 + 2 * small))


def test_nothing_is_done_in_fp32() -> None:
    model, before = rounded(torch.float32)
    assert [n for n, _ in model.named_parameters()] == list(before)
    assert not hasattr(model[-1].logits, "parametrizations")


def test_only_the_names_that_rounding_made_are_taken_back() -> None:
    normed = weight_norm(nn.Linear(3, 5))
    skewed = nn.Linear(5, 5)
    register_parametrization(skewed, "weight", nn.Tanh())  # one tensor: `original`
    model = nn.Sequential(normed, nn.Sequential(skewed))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert "1.0.parametrizations.weight.original" in before and plain_names(model) == {}
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model).bfloat16()(x.bfloat16())
    round_at_use(model, torch.bfloat16)
    assert torch.equal(model(x.bfloat16()), expected)
    after = named_tensors(model)
    assert after.keys() == before.keys() and len(plain_names(model)) == len(before)
    assert all(torch.equal(after[n], p) and after[n].dtype == p.dtype for n, p in before.items())


def test_masks_are_rounded_as_all_inputs_are_by_keyword_and_in_dicts_too() -> None:
    seen: list[torch.dtype] = []

    class Takes(nn.Linear):
        def forward(self, x: torch.Tensor, mask: Any = None, more: Any = None) -> torch.Tensor:
            seen.extend([x.dtype, mask.dtype, more["bias"].dtype, more["ids"].dtype])
            return super().forward(x)

    layers = Layers([Takes(3, 3)])
    round_inputs(layers, torch.bfloat16)
    floats = torch.ones(2, 3)
    more = {"bias": floats, "ids": torch.ones(2, dtype=torch.int64)}
    layers[0].bfloat16()(floats, mask=floats, more=more)
    assert seen == [torch.bfloat16] * 3 + [torch.int64]


def test_a_loss_is_fp32_whatever_the_logits() -> None:
    logits = torch.randn(40, 61, generator=torch.Generator().manual_seed(0))
    target = torch.arange(40)
    for dtype in DTYPES.values():
        total, _ = cross_entropy(logits.to(dtype), target)
        assert total.dtype == torch.float32
        assert torch.equal(total, cross_entropy(logits.to(dtype).float(), target)[0])


@pytest.mark.parametrize("precision", DTYPES)
def test_the_ledger_of_a_run_is_the_table(precision: str, tmp_path: Path) -> None:
    record = hybrid.train(gpt_job(train__precision=precision), "single", tmp_path)
    assert record.receipt is not None and record.receipt.engaged
    assert record.receipt.evidence["precision"] == {
        "computing": precision,
        "activations": precision,
        "stored": "fp32",
        "gradients": "fp32",
        "master_weights": "fp32",
        "optimizer_state": "fp32",
        "buffers": "fp32",
        "reductions": "none",  # one process sends nothing
    }
    scales = [2.0**16 if precision == "fp16" else None] * 3
    assert [step.loss_scale for step in record.steps] == scales
    assert not any(step.skipped for step in record.steps)
    weights = hybrid_weights(tmp_path)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    names = build_model(gpt_job())[0].tensors()
    assert weights.keys() == names.keys()


def hybrid_weights(out: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    from safetensors.torch import load_file

    return load_file(out / "checkpoints" / "final" / "model.safetensors")


def test_precisions_start_alike_and_part_by_their_rounding() -> None:
    runs = {p: hybrid.train(gpt_job(train__precision=p), "single") for p in DTYPES}
    exact = runs["fp32"]
    assert exact.weights is not None
    for precision, least, most in (("bf16", 1e-7, 5e-3), ("fp16", 1e-8, 1e-3)):
        run = runs[precision]
        assert run.weights is not None and run.weights.initial == exact.weights.initial
        away = [abs(a.loss / b.loss - 1) for a, b in zip(run.steps, exact.steps, strict=True)]
        assert least < max(away) < most, precision
        assert run.eval is not None and exact.eval is not None
        assert run.eval.loss == pytest.approx(exact.eval.loss, rel=most)


WHOLE = {
    "computing": "bf16",
    "activations": "bf16",
    "stored": "bf16+fp32",
    "gradients": "fp32",
    "master_weights": "fp32",
    "optimizer_state": "fp32",
    "buffers": "fp32",
}


@pytest.mark.parametrize("row", [row for row in WHOLE if row != "stored"])
def test_a_ledger_with_a_wrong_row_is_refused(row: str) -> None:
    assert all(check_ledger("bf16", "fp32", WHOLE).values())
    for wrong in ("fp16", "bf16+fp32", "fp32" if WHOLE[row] == "bf16" else "bf16"):
        held = check_ledger("bf16", "fp32", WHOLE | {row: wrong})
        assert [what for what, holds in held.items() if not holds] == [
            f"{row.replace('_', ' ')} in {WHOLE[row]}"
        ]


def round_buffers_too(model: nn.Module, dtype: torch.dtype) -> None:
    round_at_use(model, dtype)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(dtype)


def round_for_good(model: nn.Module, dtype: torch.dtype) -> None:
    """Without master weights. In place: the optimizer has the parameters."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def round_nothing(model: nn.Module, dtype: torch.dtype) -> None:
    """As if the precision had not been asked for."""
    for layer in model:
        layer._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (round_buffers_too, "buffers in fp32"),
        (round_for_good, "gradients in fp32"),
        (round_nothing, "computing in bf16"),
    ],
)
def test_a_run_that_holds_something_else_is_refused(
    fault: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "round_at_use", fault)
    with pytest.raises(RunError, match=f"receipt refused: .*{said}"):
        hybrid.train(gpt_job(train__precision="bf16", optimizer__name="sgd"), "single")
    monkeypatch.undo()
    hybrid.train(gpt_job(train__precision="bf16"), "single")  # the next run of the process is fine


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
        "model": {"name": "tests.test_precision:steep"},
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
