"""torch.compile: layers that are not compiled are refused, those that are compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from hybrid.job.errors import RunError

GPT = {"num_layers": 1, "width": 16, "num_heads": 2, "context": 16, "vocab_size": 61}


def compiled_job(**changes: Any) -> hybrid.Job:
    """A tiny GPT, compiled."""
    return hybrid.load_job(
        {
            "model": {"name": "gpt", "options": GPT},
            "data": {"name": "tests.workloads:sentences", "options": {"size": 16}},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "train": {"global_batch": 8, "micro_batches": 2, "steps": 8, "compile": True},
        },
        {k.replace("__", "."): v for k, v in changes.items()},
    )


def test_layers_that_torch_leaves_uncompiled_are_refused() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RunError, match="not so: layers are compiled"),
    ):
        hybrid.train(compiled_job(train__steps=1), "single")


def test_many_rounded_layers_are_compiled_once() -> None:
    """torch.compile leaves a block uncompiled that comes after eight others of its own kind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {**GPT, "num_layers": 11}
    job = compiled_job(model__options=options, train__precision="bf16", train__steps=2)
    hybrid.train(job, "single")
    left_out = torch._dynamo.utils.counters["unimplemented"]
    assert not any("recompile limit" in reason for reason in left_out), left_out


@pytest.mark.slow
def test_compiled_runs_are_equal_and_say_so(tmp_path: Path) -> None:
    result = hybrid.compare(compiled_job(), ["fsdp", "pipeline"], nproc=2, out=tmp_path)
    assert result.ok, {n: p.first_difference for n, p in result.parity.items()}
    for name, record in result.strategies.items():
        assert record.receipt and record.receipt.evidence["compiled_graphs"] > 0, name
        assert record.memory is None, "the meter keeps torch.compile from compiling"
        assert record.throughput and record.throughput.timed_steps == 4
    plain = hybrid.train(compiled_job(train__compile=False), "single")
    steps = zip(plain.steps, result.strategies["single"].steps, strict=True)
    assert max(abs(a.loss - b.loss) / a.loss for a, b in steps) < 1e-6
