"""An engine's weights can be read and replaced, and training goes on from what was put in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hybrid import records
from hybrid.job.file import to_dict
from hybrid.launch.local import run_ranks
from hybrid.strategies.registry import NAMES
from tests.conftest import ROOT, small_job


def weights_after(strategy: str, nproc: int, out: Path) -> dict[str, object]:
    """What `roundtrip.py` ends with under one strategy."""
    job = small_job(strategy__local_sgd={"sync_every": 1}, optimizer__momentum=0.9)
    records.write(to_dict(job), out / "job.json")
    program = [sys.executable, str(ROOT / "tests" / "roundtrip.py")]
    run_ranks(nproc, [str(out / "job.json"), strategy, str(out)], out, program=program)
    return load_file(out / "after.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What `single` ends with."""
    return weights_after("single", 1, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("strategy", [name for name in NAMES if name != "single"])
def test_weights_go_out_and_in(strategy: str, expected: dict[str, object], tmp_path: Path) -> None:
    got = weights_after(strategy, 4 if strategy == "2d" else 2, tmp_path)
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
