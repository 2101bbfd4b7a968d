"""Which checkpoints stay, and how they are written beside the training."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.checkpoint import save, writer
from hybrid.checkpoint.pieces import WEIGHT, Piece, shares_of
from hybrid.checkpoint.save import StateHashes
from hybrid.checkpoint.snapshot import Snapshot
from hybrid.checkpoint.tensor_file import TensorFile
from hybrid.checkpoint.tensors import read
from hybrid.checkpoint.writer import Writer, end_writers
from hybrid.job.errors import JobError, NoRoom, RunError
from hybrid.training.best import BestScores, score_of
from tests.conftest import small_job
from tests.saving_ranks import VALUES, save_all


def evaluated(step: int, loss: float, metrics: Any = None) -> dict[str, Any]:
    """An evaluation as a manifest has it."""
    result = {"loss": loss, "accuracy": None, "perplexity": None, "metrics": metrics or {}}
    return {"step": step, "result": result}


def test_which_way_is_better() -> None:
    evals = [evaluated(2, 3.0, {"f1": 0.5}), evaluated(4, 2.0, {"f1": 0.25, "loss": 7.0})]
    assert score_of(evals, 2, "loss") == -3.0 and score_of(evals, 2, "f1") == 0.5
    assert score_of(evals, 4, "loss") == -7.0, "the job's own metric goes first"
    assert score_of(evals, 3, "loss") is None
    assert score_of([evaluated(2, float("nan"))], 2, "loss") is None
    as_text: Any = [evaluated(2, "inf")]  # type: ignore[arg-type]
    assert score_of(as_text, 2, "loss") == -float("inf")
    with pytest.raises(JobError, match=r"checkpoint\.best = 'accuracy': .* valid: loss, f1$"):
        score_of(evals, 2, "accuracy")


def test_the_best_of_an_earlier_run_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, loss in ((2, 1.5), (4, 0.5), (6, 0.75), (8, 0.1)):
        monkeypatch.setitem(VALUES, "record", {"evals": [evaluated(step, loss)]})
        save_all(tmp_path, step)
    scores = BestScores("loss")
    scores.note(6, [evaluated(6, 0.75)])
    assert scores.best(tmp_path, 6) == [4]
    (tmp_path / "step-00000004" / "manifest.json").write_text("{}")
    assert BestScores("loss").best(tmp_path, 6) == [6], "what is damaged has no score"
    assert BestScores("f1").best(tmp_path, 6) == []


def test_the_writer_saves_a_copy_and_its_failure_is_told(tmp_path: Path) -> None:
    live = torch.zeros(5)
    piece = Piece("a", WEIGHT, (5,), live)
    begin, thread = threading.Event(), Writer(1, 20)
    first = None
    hashes = set()
    for step in (1, 2, 3):
        live += 1
        begin.clear()
        first = Snapshot(step, shares_of([piece]), {}, {}, VALUES).copy(first)
        memory = first.shares[0].piece.tensor.data_ptr()
        copied = first

        def work(copied: Snapshot = copied) -> StateHashes:
            begin.wait(20)
            return save.save(tmp_path, copied, 0, thread.gather)

        thread.start(work)
        live += 1
        with pytest.raises(RunError, match="still being written"):
            thread.start(work)
        assert thread.take(wait=False) is None and live[0] == 2 * step
        begin.set()
        saved = thread.take(wait=True)
        assert saved is not None and thread.take(wait=True) is None
        hashes.add(saved.state_hash)
        file = TensorFile(tmp_path / f"step-0000000{step}" / "rank00000.safetensors")
        assert read(file, "weight/a@0", 0, 5).tolist() == [2 * step - 1] * 5
        file.close()
        assert first.shares[0].piece.tensor.data_ptr() == memory
    assert len(hashes) == 3

    def fails() -> StateHashes:
        raise NoRoom("planted")

    thread.start(fails)
    with pytest.raises(NoRoom, match="planted"):
        thread.take(wait=True)
    assert thread.take(wait=False) is None


def test_a_copy_that_fails_is_told_and_holds_nothing_up() -> None:
    thread, begin, made = Writer(1, 20), threading.Event(), list[str]()

    def fails() -> None:
        begin.wait(20)
        made.append("copy")
        raise MemoryError("planted")

    thread.wait_for_copy()
    thread.start(lambda: made.append("save"), fails)  # type: ignore[func-returns-value]
    threading.Timer(0.05, begin.set).start()
    thread.wait_for_copy()
    assert made == ["copy"]
    with pytest.raises(MemoryError, match="planted"):
        thread.take(wait=True)
    assert made == ["copy"]


def test_a_writer_does_not_hold_up_a_run_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PATIENCE_S", 0.1)
    thread, end = Writer(1, 20), threading.Event()
    thread.start(lambda: end.wait(20) and StateHashes(""))  # type: ignore[arg-type, return-value]
    end_writers()
    assert thread.take(wait=False) is None
    end.set()
    assert thread.take(wait=True) == StateHashes("")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"keep": 2, "best": "loss", "async": True}, ["keep", "best", "async"]),
        ({"every": 3, "best": "loss"}, ["best"]),
        ({"every": 3, "keep": 2, "best": "loss", "async": True}, []),
        ({"every": 3, "async": False}, []),
        ({"async": False}, []),
    ],
)
def test_keys_without_effect_are_told(asked: dict[str, Any], words: list[str]) -> None:
    lines = small_job(checkpoint=asked).warnings()
    assert [line.split()[0] for line in lines] == [f"checkpoint.{word}" for word in words]
    assert all("has no effect without checkpoint." in line for line in lines)


def test_an_unknown_metric_is_told_before_anything_starts() -> None:
    metrics = ["tests.workloads:f1_score"]
    with pytest.raises(JobError, match=r"^job: checkpoint\.best = 'f1': unknown; valid: loss, acc"):
        small_job(checkpoint={"best": "f1"}, train__metrics=metrics)
    assert small_job(checkpoint={"best": "f1_score", "every": 1, "keep": 1}, train__metrics=metrics)
