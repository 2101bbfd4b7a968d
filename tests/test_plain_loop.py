"""Every strategy against a plain torch loop that uses nothing of this project: a user's own model
and data by import path, one full batch of 60 samples in 4 micro-batches, AdamW, 10 steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

import hybrid
from hybrid.layout import split
from tests.plain_loop import plain_loop, plain_order
from tests.workloads import points, regression

STEPS = 10


def own_job() -> hybrid.Job:
    """The job in the words of the toolkit."""
    return hybrid.load_job(
        {
            "model": {"name": "tests.workloads:regression"},
            "data": {"name": "tests.workloads:points"},
            "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1},
            "train": {"global_batch": 60, "micro_batches": 4, "steps": STEPS},
        }
    )


@pytest.mark.parametrize("nproc", [2, 3, 4])
def test_every_strategy_is_the_plain_loop(nproc: int, tmp_path: Path) -> None:
    result = hybrid.compare(own_job(), nproc=nproc, out=tmp_path)
    assert {n for n, r in result.strategies.items() if r.status == "failed"} == set()
    whole = plain_loop(regression, points, STEPS, lambda step: [list(range(60))])
    alone = plain_loop(
        regression, points, STEPS, lambda step: split(plain_order(60, 0, step), nproc)
    )
    ran = [n for n, r in result.strategies.items() if r.status == "ok"]
    assert len(ran) == (9 if nproc == 4 else 8)
    for name in ran:
        losses, weights = alone if name == "local_sgd" else whole
        got = [s.loss for s in result.strategies[name].steps]
        worst = max(abs(a - b) / abs(b) for a, b in zip(got, losses, strict=True))
        assert worst < 1e-6, (name, worst)
        final = load_file(tmp_path / name / "checkpoints" / "final" / "model.safetensors")
        for key, expected in weights.items():
            away = (final[key] - expected).abs().max() / expected.abs().max()
            assert away < 1e-5, (name, key, away)
        assert result.parity[name].ok, (name, result.parity[name].first_difference)
        evaluated = result.strategies[name].eval
        assert evaluated is not None and evaluated.samples == 31
