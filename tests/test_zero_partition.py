"""ZeRO-3 gets a model that is cut already: no rank ever holds all of its parameters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.models.gpt import gpt
from tests.conftest import small_job


class Watched(nn.Module):
    """A layer with a parameter that is not trained and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((7,), 1.5), requires_grad=False)
        self.register_buffer("shift", torch.full((7,), 0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.mean() + self.shift.mean()


def model(**options: Any) -> Any:
    """A GPT; in a rank, DeepSpeed fails to take a model of which a parameter is whole."""
    if "RANK" in os.environ:
        from deepspeed.runtime.engine import DeepSpeedEngine

        take = DeepSpeedEngine._configure_distributed_model

        def check(engine: Any, given: nn.Module) -> None:
            whole = [name for name, p in given.named_parameters() if p.numel()]
            assert not whole, f"DeepSpeed takes whole parameters: {whole}"
            kinds = {p.ds_tensor.dtype for p in given.parameters()}  # type: ignore[attr-defined]
            assert kinds == {torch.bfloat16 if engine.bfloat16_enabled() else torch.float32}
            take(engine, given)

        DeepSpeedEngine._configure_distributed_model = check
    layers, loss = gpt(**options)
    return [*layers, Watched()], loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_parameter_is_whole_when_deepspeed_takes_the_model(
    precision: str, tmp_path: Path
) -> None:
    options = {"num_layers": 2, "width": 30, "num_heads": 3, "context": 7, "vocab_size": 61}
    job = small_job(
        model={"name": "tests.test_zero_partition:model", "options": options},
        data={
            "name": "tests.workloads:sentences",
            "options": {"size": 23, "tokens": 7, "vocab_size": 61},
        },
        train__global_batch=9,
        train__precision=precision,
    )
    comparison = hybrid.compare(job, ["single", "zero3"], 4, tmp_path)
    assert comparison.ok, comparison.strategies["zero3"].reason
