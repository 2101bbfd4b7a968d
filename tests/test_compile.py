"""torch.compile: layers that are not compiled are refused, those that are compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from hybrid.engines.layers import prepare_layers
from hybrid.engines.precision import DTYPES, Observer, round_at_use
from hybrid.job.errors import RunError
from hybrid.models import build_model

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


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What torch.compile would give inductor, and that runs as it is."""
    found: list[torch.fx.GraphModule] = []

    def run_as_it_is(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: run_as_it_is)
    torch._dynamo.reset()
    return found


def test_many_rounded_layers_are_compiled_once(graphs: list[Any]) -> None:
    """torch.compile leaves a block uncompiled that comes after eight others of its own kind."""
    torch._dynamo.utils.counters.clear()
    options = {**GPT, "num_layers": 11}
    job = compiled_job(model__options=options, train__precision="bf16", train__steps=2)
    hybrid.train(job, "single")
    left_out = torch._dynamo.utils.counters["unimplemented"]
    assert graphs and not any("recompile limit" in reason for reason in left_out), left_out


def test_recomputed_layers_are_compiled_and_keep_their_dropout(graphs: list[Any]) -> None:
    """torch.compile gives what it computes again by itself the rows of another micro-batch."""
    options = {**GPT, "num_layers": 3, "dropout": 0.1}
    job = compiled_job(model__options=options, train__steps=4, train__activation_checkpointing=True)
    compiled = hybrid.train(job, "single")
    assert len(graphs) > 4 and compiled.receipt and compiled.receipt.engaged
    changes = {"train__compile": False, "train__activation_checkpointing": False}
    plain = hybrid.train(compiled_job(model__options=options, train__steps=4, **changes), "single")
    losses = [[step.loss for step in run.steps] for run in (compiled, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_what_is_watched_is_compiled_once(
    recomputed: bool, precision: str, rounded: bool, graphs: list[Any]
) -> None:
    """Hooks would be compiled along, and each layer once more when they go."""
    options = {"model__options": {**GPT, "num_layers": 3}, "train__precision": precision}
    job = compiled_job(**options, train__activation_checkpointing=recomputed)
    layers = prepare_layers(job, build_model(job)[0])
    observer, model = Observer(layers, compiled=True), layers.whole()
    if rounded:
        round_at_use(model, DTYPES[precision])
    elif precision == "bf16":  # as DeepSpeed holds them
        model.to(torch.bfloat16)
    for micro_batch in range(3):
        model(torch.zeros(5, 16, dtype=torch.int64)).sum().backward()
        if micro_batch == 1:
            observer.stop()
    assert len(graphs) == 3, "the embeddings, one block for all, and the logits"
    assert (observer.computing, observer.activations) == ({precision}, {precision})
    model(torch.zeros(7, 16, dtype=torch.int64))
    assert not observer._ends and observer.computing == {precision}


@pytest.mark.slow
def test_compiled_runs_are_equal_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank computes micro-batches of one shape by one thread, so that g++, which takes most
    of this test's time, compiles for one of them what all then load."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    of_two_samples = {"train__micro_batches": 4, "strategy__fsdp": {"micro_batches": 2}}
    job = compiled_job(**of_two_samples)
    result = hybrid.compare(job, ["fsdp", "pipeline"], nproc=2, out=tmp_path)
    assert result.ok, {n: p.first_difference for n, p in result.parity.items()}
    for name, record in result.strategies.items():
        assert record.receipt and record.receipt.evidence["compiled_graphs"] > 0, name
        assert record.receipt.evidence["precision"]["computing"] == "fp32"
        assert record.memory is None, "the meter keeps torch.compile from compiling"
        assert record.throughput and record.throughput.timed_steps == 4
    plain = hybrid.train(compiled_job(**of_two_samples, train__compile=False), "single")
    steps = zip(plain.steps, result.strategies["single"].steps, strict=True)
    assert max(abs(a.loss - b.loss) / a.loss for a, b in steps) < 1e-6
