"""The script for a day with a GPU, end to end on this CPU at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


def test_the_script_for_a_gpu_runs_whole_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PRECISIONS", ("fp32",))
    gpu.main(["--out", str(tmp_path), "--small"])
    found = json.loads((tmp_path / "gpu.json").read_text())
    runs = {run["name"]: run for run in found["speed"]["runs"]}
    assert list(runs) == ["plain loop, before", *gpu.FAST, "plain loop, after"]
    losses = runs["plain loop, before"]["losses"]
    assert len(losses) == 12 and losses[-1] < losses[0]
    for run in runs.values():
        assert run["losses"] == pytest.approx(losses, rel=0.01), run["name"]  # bf16
        assert run["tokens_per_s"] > 0 and run["mfu"] > 0
    table = found["agreement"]["fp32"]
    assert [row["strategy"] for row in table] == gpu.STRATEGIES
    assert all(row["equal"] for row in table), table


def test_what_would_take_too_long_is_not_run_and_said() -> None:
    assert gpu.agreement(Path(), small=True, begin_by=0.0) == dict.fromkeys(gpu.PRECISIONS)
