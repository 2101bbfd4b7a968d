"""Python looks for garbage rarely while a command starts, and as usual in its steps."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch

from hybrid.launch.garbage import RARELY
from hybrid.training.progress import Watcher
from hybrid.training.run import launch

from .conftest import small_job


class Watched(torch.nn.Linear):
    """A layer that is made while garbage is rarely looked for, and runs while it is as usual."""

    def __init__(self) -> None:
        super().__init__(4, 10)
        assert gc.get_threshold() == RARELY

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            print("thresholds", *gc.get_threshold())
        return super().forward(inputs)


def watched() -> tuple[list[torch.nn.Module], object]:
    """That layer and its loss, as a job takes them."""
    return [Watched()], torch.nn.functional.cross_entropy


def test_steps_look_for_garbage_as_usual(tmp_path: Path) -> None:
    ask = [sys.executable, "-c", "import gc; print('thresholds', *gc.get_threshold())"]
    usual = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    given = small_job(model={"name": "tests.test_garbage:watched"}, data__options__features=4)
    launch(given, "ddp", 2, tmp_path, Watcher())
    said = (tmp_path / "logs" / "rank1.log").read_text()
    assert said.count(usual) == said.count("thresholds") >= 6, said
