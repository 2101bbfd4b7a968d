"""State that is special goes through a checkpoint: replicas, hooks, own optimizers, loss scales."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid.launch.local import run_ranks
from tests.conftest import ROOT
from tests.resuming import Case

Results = dict[str, Any]


def on_four_ranks(cases: list[Case], out: Path) -> Results:
    """What `resuming.py` found, by the names of the cases."""
    (out / "cases.json").write_text(json.dumps(cases))
    program = [sys.executable, str(ROOT / "tests" / "resuming.py")]
    modules = ["hybrid.engines.accelerated", "accelerate"]
    run_ranks(4, [str(out / "cases.json"), str(out)], out, program=program, modules=modules)
    found: Results = json.loads((out / "result.json").read_text())
    return found


ADAMW = {"optimizer": {"name": "adamw", "lr": 0.01}}
SYNC = {"strategy.local_sgd.sync_every": 4}
CASES: list[Case] = [
    {
        "name": "local_sgd",
        "strategy": "local_sgd",
        "job": ADAMW | SYNC | {"train.steps": 11},
        "saves": [3, 4, 6],
        "goes_on": [{"at": 3}, {"at": 4}, {"at": 6}, {"at": 6, "strategy": "ddp"}],
    },
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What all cases came to on four ranks."""
    return on_four_ranks(CASES, tmp_path_factory.mktemp("resuming"))


def same(found: Results, name: str, *which: int) -> None:
    """Assert that these runs went on as the one without a stop."""
    whole = found[name]["whole"]
    for i in which:
        run = found[name]["goes_on"][i]
        assert run["losses"] == whole["losses"][-len(run["losses"]) :], (name, i)
        for key in ("hash", "own", "scale", "numbers"):
            assert run[key] == whole[key], (name, i, key)


def test_local_sgd_goes_on_between_merges_and_at_one(found: Results) -> None:
    same(found, "local_sgd", 0, 1, 2)
