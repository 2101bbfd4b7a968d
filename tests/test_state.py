"""An engine's weights can be read and replaced, and training goes on from what was put in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hybrid import records
from hybrid.job.file import to_dict
from hybrid.launch.local import run_ranks
from hybrid.strategies import registry
from tests.conftest import ROOT, small_job

# Five layers, three heads, tied weights: FSDP2 then has a unit at the root, which evaluation leaves
# gathered.
TIED: dict[str, Any] = {"num_layers": 5, "width": 24, "num_heads": 3, "context": 16, "tied": True}
GPT = {
    "model": {"name": "gpt", "options": TIED | {"vocab_size": 101}},
    "data": {"name": "tests.workloads:sentences", "options": {"vocab_size": 101}},
    "train__global_batch": 14,
}
# Merges weight replicas by samples, and those of the sentences count unequal numbers of targets.
CHANGES = {name: {} if name == "local_sgd" else GPT for name in registry.NAMES}


def weights_after(strategy: str, nproc: int, changes: dict[str, Any], out: Path) -> dict[str, Any]:
    """What `roundtrip.py` ends with under one strategy."""
    settings = {"strategy__local_sgd": {"sync_every": 1}, "optimizer__momentum": 0.9}
    job = small_job(**changes, **settings)
    records.write(to_dict(job), out / "job.json")
    program = [sys.executable, str(ROOT / "tests" / "roundtrip.py")]
    given = [str(out / "job.json"), strategy, str(out)]
    run_ranks(nproc, given, out, program=program, modules=registry.modules(strategy))
    return load_file(out / "after.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """What `single` ends with, without and with the GPT."""
    return {
        bool(changes): weights_after("single", 1, changes, tmp_path_factory.mktemp("single"))
        for changes in ({}, GPT)
    }


@pytest.mark.parametrize("strategy", [name for name in registry.NAMES if name != "single"])
def test_weights_go_out_and_in_after_an_evaluation(
    strategy: str, expected: dict[bool, dict[str, Any]], tmp_path: Path
) -> None:
    changes = CHANGES[strategy]
    got = weights_after(strategy, 4 if strategy == "2d" else 2, changes, tmp_path)
    wanted = expected[bool(changes)]
    assert list(got) == list(wanted)
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
