"""Runs on four ranks whose saving fails or is killed, and the runs that go on from them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid.checkpoint import snapshot
from hybrid.checkpoint.folders import list_checkpoints, step_of, verify
from hybrid.checkpoint.manifest import read_manifest
from hybrid.checkpoint.snapshot import Unfilled
from hybrid.job.errors import NoRoom, RunFailed, exit_status
from hybrid.job.variants import resolve
from hybrid.launch.warm import warm_ranks
from hybrid.records import Record
from hybrid.training import checkpointing
from hybrid.training.progress import Watcher
from hybrid.training.resume import choose
from hybrid.training.run import launch
from tests.accidents import LATE_S, Accident
from tests.conftest import small_job
from tests.test_failures import ranks_of
from tests.test_no_room import small_disk

__all__ = ["small_disk"]  # a fixture

ASKED = {"every": 2, "keep": 2, "async": True, "best": "loss"}
ADAM = {"name": "adamw", "lr": 0.01}


def job(**changes: Any) -> Any:
    """Seven steps, saved beside the training after 2, 4, 6 and 7."""
    limits = {"collective_timeout_s": 20}
    more = {"optimizer": ADAM, "checkpoint": ASKED, "train__steps": 7, "launch": limits}
    return small_job(**(more | changes))


def run(out: Path, accident: Accident, resume: Path | None = None, **changes: Any) -> Record:
    """Train under fsdp on four ranks."""
    rest = {"program": accident.program(), "resume": resume}
    return launch(job(**changes), "fsdp", 4, out, Watcher(), **rest)


def steps_in(out: Path) -> list[int]:
    """The steps of the committed checkpoints, all of which are whole."""
    found = list_checkpoints(out / "checkpoints")
    assert [verify(path, whole=True)[1] for path in found] == [[]] * len(found)
    return sorted(map(step_of, found))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Record]]:
    """A run that nothing befalls."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with warm_ranks():
        yield out, run(out, Accident())


def test_the_newest_and_the_best_are_kept(uninterrupted: tuple[Path, Record]) -> None:
    """Each evaluation is made once: at the saves, and the last one counts for the end."""
    out, record = uninterrupted
    assert [one.step for one in record.evals] == [2, 4, 6, 7]
    assert record.eval == record.evals[-1].result and record.checkpoint is not None
    losses = {one.step: one.result.loss for one in record.evals}
    assert min(losses, key=losses.__getitem__) == 2 and steps_in(out) == [2, 6, 7]
    manifest = verify(out / "checkpoints" / "step-00000007")[0]
    assert manifest is not None and manifest.state_hash == record.checkpoint.state_hash
    saved = {one["step"]: one["result"]["loss"] for one in manifest.values["record"]["evals"]}
    assert saved == losses
    assert not list((out / "checkpoints").glob("*.part"))


def hashes_in(out: Path) -> dict[str, str]:
    """The state hash of each checkpoint."""
    found = {path.name: read_manifest(path) for path in list_checkpoints(out / "checkpoints")}
    return {name: manifest.state_hash for name, manifest in found.items()}


def test_the_next_step_waits_for_a_late_copy(
    uninterrupted: tuple[Path, Record], tmp_path: Path
) -> None:
    """A copy made after that step would be of another state than the checkpoint's."""
    whole, expected = uninterrupted
    record = run(tmp_path, Accident(random.randrange(4), what="late"))
    assert hashes_in(tmp_path) == hashes_in(whole) and steps_in(tmp_path) == [2, 6, 7]
    assert record.checkpoint == expected.checkpoint and record.steps == expected.steps


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_late_copies_of_zero_are_what_a_save_at_once_has(strategy: str, tmp_path: Path) -> None:
    found = []
    for accident, beside in (
        (Accident(), False),
        (Accident(random.randrange(4), what="late"), True),
    ):
        out = tmp_path / str(beside)
        asked = job(checkpoint={"every": 2, "async": beside})
        launch(asked, strategy, 4, out, Watcher(), program=accident.program())
        found.append(hashes_in(out))
    assert found[0] == found[1] and len(found[0]) == 4


@pytest.mark.parametrize("optimizer", [ADAM, {"name": "sgd", "lr": 0.01, "momentum": 0.9}])
def test_late_copies_are_what_a_save_at_once_has(
    optimizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[int] = []

    def fill(unfilled: Sequence[Unfilled]) -> None:
        late.append(len(unfilled))
        time.sleep(LATE_S / 3)
        snapshot.fill(unfilled)

    monkeypatch.setattr(checkpointing, "fill", fill)
    found = []
    for name, beside in (("at_once", False), ("late", True)):
        asked = job(optimizer=optimizer, checkpoint={"every": 2, "async": beside})
        hybrid.train(asked, "single", tmp_path / name)
        found.append(hashes_in(tmp_path / name))
    assert found[0] == found[1] and len(found[0]) == len(late) == 4 and min(late) > 0


def test_an_asynchronous_save_that_fails_stops_the_run(
    uninterrupted: tuple[Path, Record], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(RunFailed) as failed:
        run(out, Accident(2, "saving", 1, "block", 3, what="full"))
    words = str(failed.value.failure.message)
    assert words.startswith(f"{out / 'checkpoints'}: cannot be written to: File too large (rank 2 ")
    assert words.endswith("saving the state after 4 steps)") and "\n" not in words
    assert exit_status(failed.value) == exit_status(NoRoom("")) == 3
    assert steps_in(out) == [2] and ranks_of(out) == []
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("accident", "steps"),
    [
        (Accident(3, "saving", 1, "block", 4), [2]),
        (Accident(0, "saving", 1, "rename", 0), [2]),
        (Accident(0, "saving", 3, "unlink", 2), [2, 6, 7]),
    ],
    ids=["writing", "commit", "pruning"],
)
def test_a_killed_save_loses_nothing(
    accident: Accident, steps: list[int], uninterrupted: tuple[Path, Record], tmp_path: Path
) -> None:
    whole, record = uninterrupted
    out = tmp_path / "run"
    with pytest.raises(RunFailed, match="SIGKILL"):
        run(out, accident)
    assert steps_in(out) == steps and list((out / "checkpoints").glob("*.part"))
    chosen = choose(out, "auto", resolve(job(), "fsdp"))
    assert chosen is not None and step_of(chosen.folder) == steps[-1]
    again = run(out, Accident(), chosen.folder)
    assert again.checkpoint == record.checkpoint and steps_in(out) == [2, 6, 7]
    assert again.steps == record.steps and again.evals == record.evals
    weights = [path / "checkpoints" / "final" / "model.safetensors" for path in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list((out / "checkpoints").glob("*.part"))


def test_a_snapshot_that_is_never_renewed_is_noticed(
    uninterrupted: tuple[Path, Record], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(RunFailed, match="after 4 steps: it is the state of the checkpoint before"):
        run(out, Accident(what="old"))
    assert steps_in(out) == [2]


@pytest.mark.slow
def test_a_disk_that_fills(small_disk: Any) -> None:
    out = small_disk("size=400k") / "run"
    asked = {"every": 1, "async": True}
    with warm_ranks(), pytest.raises((RunFailed, NoRoom)) as failed:
        run(out, Accident(), checkpoint=asked, train__steps=60)
    assert exit_status(failed.value) == 3 and "No space left on device" in str(failed.value)
    assert len(steps_in(out)) > 2 and not list((out / "checkpoints").glob("*.part"))
