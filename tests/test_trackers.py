"""Trackers: names are checked before anything starts, and TensorBoard has every figure of a run.

Those that go to the network are not tried here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid.job.errors import JobError
from hybrid.training.trackers import Trackers, check_trackers, flatten, step_values
from tests.conftest import ROOT

LINE: dict[str, Any] = {
    "step": 0,
    "loss": 3.5,
    "grad_norm": 1.25,
    "lr": 3e-4,
    "samples": 8,
    "targets": 512,
}
LINE |= {"sample_digest": "0" * 16, "seconds": 0.5, "memory_bytes": 2048, "loss_scale": None}
LINE |= {"skipped": False}


def test_an_unknown_tracker_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(JobError) as refused:
        check_trackers(["tensorboard", "tensorbord"])
    message = str(refused.value)
    assert message.startswith("log.trackers = 'tensorbord': unknown; valid: aim, clearml, ")
    assert "tensorboard" in message and "wandb" in message and "\n" not in message


def test_all_is_not_a_name() -> None:
    with pytest.raises(JobError, match=r"log.trackers = 'all': unknown"):
        check_trackers(["all"])


def test_a_tracker_named_twice_is_refused() -> None:
    pytest.importorskip("tensorboard")
    with pytest.raises(JobError, match=r"log.trackers = .*: names 'tensorboard' twice"):
        check_trackers(["tensorboard", "tensorboard"])


@pytest.mark.parametrize(
    ("name", "install"), [("wandb", "pip install wandb"), ("aim", "pip install 'aim<4'")]
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, install: str
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ModuleNotFoundError) as missing:
        check_trackers([name])
    assert str(missing.value) == (
        f"log.trackers = {name!r}: its package is not installed; {install}"
    )
    assert missing.value.name == name


def test_no_tracker_costs_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from hybrid.training.trackers import Trackers\n"
        f"t = Trackers([], pathlib.Path({str(tmp_path)!r}), {{}})\n"
        "t.log({}, 0); t.finish()\n"
        "print('torch' in sys.modules or 'accelerate' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_a_step_is_sent_as_its_known_figures() -> None:
    known = {"loss": 3.5, "grad_norm": 1.25, "lr": 3e-4, "step_s": 0.5, "memory_bytes": 2048}
    assert step_values(LINE) == known | {"samples_per_s": 16.0, "tokens_per_s": 1024.0}
    assert step_values(LINE | {"targets": 8}) == known | {"samples_per_s": 16.0}
    old = {k: LINE[k] for k in ("step", "loss", "grad_norm", "lr", "samples")}
    assert step_values(old) == {k: LINE[k] for k in ("loss", "grad_norm", "lr")}
    skipped = step_values(LINE | {"grad_norm": None, "loss_scale": 1024.0, "skipped": True})
    assert "grad_norm" not in skipped
    assert (skipped["loss_scale"], skipped["skipped"]) == (1024.0, 1)


def test_the_job_is_flat_and_of_simple_values() -> None:
    job = {"a": {"b": 1, "c": {"d": [1, 2]}, "e": None}, "f": "text", "g": True}
    assert flatten(job) == {"a.b": 1, "a.c.d": "[1, 2]", "f": "text", "g": True}


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, Any]]] = []
        self.ended = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.ended = True


def test_every_tracker_is_told_the_same_and_is_ended(tmp_path: Path) -> None:
    told = Trackers([], tmp_path, {})
    told.trackers = [Recorder(), Recorder()]
    told.log(LINE, 0)
    told.log(LINE, 1)
    told.log_eval({"loss": 2.0, "samples": 40, "perplexity": 7.4, "accuracy": None}, 2)
    told.finish()
    first, second = told.trackers
    assert first.told == second.told and first.ended and second.ended
    assert [step for step, _ in first.told] == [0, 1, 2]
    assert first.told[-1][1] == {"eval_loss": 2.0, "eval_perplexity": 7.4}
    told.trackers = [Recorder()]
    told.log_eval({"loss": 2.5, "accuracy": 0.5, "perplexity": None}, 7)
    told.finish()
    assert told.trackers[0].told == [(7, {"eval_loss": 2.5, "eval_accuracy": 0.5})]
    assert told.trackers[0].ended


# As the first of two ranks whose other one never comes: a group that was waited for would hang.
TENSORBOARD = """
import pathlib, torch
from hybrid.training.trackers import Trackers
threads = torch.get_num_threads()
t = Trackers(["tensorboard"], pathlib.Path(OUT), {"model": {"options": {"sizes": [4, 2]}}})
for i in range(3):
    t.log(LINE | {"loss": 3.5 - i}, i)
t.log_eval({"loss": 2.0, "perplexity": 7.25, "accuracy": 0.5}, 3)
t.finish()
assert not torch.distributed.is_initialized()
assert torch.get_num_threads() == threads
"""


def test_tensorboard_has_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    for key, value in (ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(key, value)
    code = TENSORBOARD.replace("LINE", repr(LINE)).replace("OUT", repr(str(tmp_path)))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (tmp_path / "trackers").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    found = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found.pop("loss") == [(0, 3.5), (1, 2.5), (2, 1.5)]
    assert found.pop("lr")[2] == (2, pytest.approx(3e-4))
    assert found == {
        "grad_norm": [(i, 1.25) for i in range(3)],
        "step_s": [(i, 0.5) for i in range(3)],
        "samples_per_s": [(i, 16.0) for i in range(3)],
        "tokens_per_s": [(i, 1024.0) for i in range(3)],
        "memory_bytes": [(i, 2048.0) for i in range(3)],
        "eval_loss": [(3, 2.0)],
        "eval_perplexity": [(3, 7.25)],
        "eval_accuracy": [(3, 0.5)],
    }
    (settings,) = run.glob("*/hparams.yml")
    assert "model.options.sizes: '[4, 2]'" in settings.read_text()
