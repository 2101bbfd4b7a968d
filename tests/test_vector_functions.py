"""Everything that computes calls a vector function on one thread before a user's module is there.

torch's first vector call of a process can be wrong where two threads make it (pytorch#188792)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hybrid
from hybrid.strategies import registry

MODULE = """
from tests.test_vector_functions import EVENTS
from tests.workloads import regression, points
EVENTS.append("module")
"""
EVENTS: list[str] = []


def load(module: str) -> hybrid.Job:
    return hybrid.load_job(
        {
            "model": {"name": f"{module}:regression"},
            "data": {"name": f"{module}:points"},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "train": {"global_batch": 12, "steps": 1},
        }
    )


def open_engine(job: hybrid.Job) -> None:
    from hybrid.data import build_data
    from hybrid.models import build_model

    layers, loss = build_model(load("tests.workloads"))
    registry.open_engine(job, "single", layers, loss)
    build_data(job)


@pytest.mark.parametrize(
    "compute",
    [
        lambda job: importlib.import_module("hybrid.training.check").check_job(job),
        lambda job: hybrid.train(job, "single"),
        open_engine,
    ],
    ids=["check", "train", "open_engine"],
)
def test_a_vector_function_comes_before_a_user_s_module(
    compute: Callable[[hybrid.Job], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = importlib.import_module("torch")
    (tmp_path / "module_of_a_user.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "module_of_a_user", raising=False)
    tanh, threads = torch.tanh, torch.get_num_threads()
    monkeypatch.setattr(torch, "tanh", lambda x: (EVENTS.append(f"{x.numel()} number"), tanh(x))[1])
    EVENTS.clear()
    try:
        compute(load("module_of_a_user"))
    finally:
        torch.set_num_threads(threads)
    assert EVENTS[0] == "1 number" and "module" in EVENTS, EVENTS
