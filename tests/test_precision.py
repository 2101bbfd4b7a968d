"""One meaning of `train.precision`: what a run holds and computes in, and what is refused.

fp16's loss scale is in test_loss_scale.py, the strategies of several processes in test_language.py.
"""

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
from hybrid.engines import replicas
from hybrid.engines.precision import (
    DTYPES,
    EXACT,
    check_ledger,
    forbid_tf32,
    plain_names,
    round_at_use,
    round_inputs,
)
from hybrid.engines.state import named_tensors
from hybrid.job.errors import RunError
from hybrid.models import build_model
from hybrid.models.layers import Layers
from hybrid.models.losses import cross_entropy

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
        "fp32_products": "fp32",
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
    "fp32_products": "fp32",
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


def test_no_product_of_fp32_tensors_is_rounded_to_tf32() -> None:
    """torch allows it for convolutions by itself, and for products where a user's code asked."""
    found = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert forbid_tf32() == []  # that was torch's own doing
        assert torch.backends.cudnn.conv.fp32_precision in EXACT
        with torch.backends.cudnn.flags(enabled=False):  # it reads torch's older setting
            assert not torch.backends.cudnn.enabled
        assert torch.backends.cudnn.allow_tf32 is False
        torch.set_float32_matmul_precision("medium")
        (said,) = forbid_tf32()
        assert "cuda.matmul.fp32_precision has no effect" in said
        assert torch.get_float32_matmul_precision() == "highest"
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # by the model's code, later
        layers, loss = build_model(gpt_job())
        engine = hybrid.open_engine(gpt_job(), "single", layers, loss)
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        receipt = engine.receipt()
        assert not receipt.engaged and "fp32 products in fp32" in str(receipt.reason)
    finally:
        torch.backends.cudnn.conv.fp32_precision = found
        torch.set_float32_matmul_precision("highest")
