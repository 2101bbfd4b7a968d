"""Of several ranks that ended badly, the one named is the one that began it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from hybrid.config import JobError
from hybrid.launch import PEER_LOST, Failure, RunFailed, first_cause
from hybrid.rank import leave_error

LOST = "DistBackendError: [../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4321"


def leave(logs: Path, rank: int, at: float, message: str, is_job: bool = False) -> None:
    """What a rank that raises leaves behind."""
    what = {"time": at, "message": message, "details": f"trace of {rank}", "is_job": is_job}
    (logs / f"rank{rank}.error.json").write_text(json.dumps(what))


def log(logs: Path, rank: int, text: str = "") -> None:
    """What a rank printed."""
    (logs / f"rank{rank}.log").write_text(text)


def test_the_earliest_raise_wins_whatever_its_rank(tmp_path: Path) -> None:
    leave(tmp_path, 0, 12.0, "ValueError: second")
    leave(tmp_path, 1, 11.0, "RuntimeError: first")
    leave(tmp_path, 2, 13.0, "ValueError: third")
    found = first_cause({0: 1, 1: 1, 2: 1}, tmp_path, seen=20.0)
    assert found == Failure(1, "RuntimeError: first", "trace of 1", is_job=False)


@pytest.mark.parametrize("words", PEER_LOST)
def test_a_lost_connection_comes_last_even_when_it_is_earlier(words: str, tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, f"RuntimeError: connection: {words}")
    leave(tmp_path, 1, 2.0, "ValueError: the cause")
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=3.0).message == "ValueError: the cause"


def test_a_killed_rank_beats_the_connections_it_broke(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, LOST)
    leave(tmp_path, 2, 1.1, LOST)
    log(tmp_path, 1, "last words")
    found = first_cause({0: 1, 1: -signal.SIGKILL, 2: 1}, tmp_path, seen=5.0)
    assert found == Failure(1, "was ended by SIGKILL", "last words")


def test_of_lost_connections_alone_the_earliest_is_named(tmp_path: Path) -> None:
    leave(tmp_path, 0, 2.0, LOST)
    leave(tmp_path, 1, 1.0, LOST)
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=3.0).rank == 1


def test_an_error_raised_before_a_kill_was_seen_is_the_cause(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, "ValueError: the cause")
    log(tmp_path, 1)
    assert first_cause({0: 1, 1: -signal.SIGABRT}, tmp_path, seen=2.0).rank == 0


def test_only_ranks_that_ended_badly_count(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, "ValueError: of a rank that still runs")
    leave(tmp_path, 1, 2.0, "ValueError: the cause")
    assert first_cause({1: 1}, tmp_path, seen=3.0).rank == 1


def test_a_rank_that_leaves_nothing_is_told_by_its_status_and_the_end_of_its_log(
    tmp_path: Path,
) -> None:
    log(tmp_path, 0, "\n".join(f"line {i}" for i in range(50)))
    found = first_cause({0: 7}, tmp_path, seen=1.0)
    assert found.message == "exited with 7"
    assert found.details.splitlines() == [f"line {i}" for i in range(30, 50)]


def test_a_log_that_is_not_text_is_shown_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_bytes(b"\xff\xfe end")
    assert first_cause({0: 1}, tmp_path, seen=1.0).details.endswith("end")


def test_an_error_of_the_job_stays_one(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, "train.steps = 0: wrong", is_job=True)
    leave(tmp_path, 1, 2.0, LOST)
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=3.0).is_job


def test_the_failure_names_its_rank_and_cause() -> None:
    error = RunFailed(Failure(3, "was ended by SIGKILL", ""))
    assert str(error).startswith("rank 3 on ") and str(error).endswith(": was ended by SIGKILL")


def raised(error: Exception) -> Exception:
    """The error with a traceback."""
    try:
        raise error
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "message", "is_job"),
    [
        (ValueError("one\ntwo"), "ValueError: one", False),
        (RuntimeError(), "RuntimeError: ", False),
        (JobError("model.name = 'x': unknown"), "model.name = 'x': unknown", True),
    ],
)
def test_what_a_rank_leaves_is_what_the_launcher_reads(
    error: Exception,
    message: str,
    is_job: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYBRID_LOGS", str(tmp_path))
    monkeypatch.setenv("RANK", "2")
    before = time.time()
    leave_error(raised(error))
    assert [path.name for path in tmp_path.iterdir()] == ["rank2.error.json"]
    assert before <= json.loads((tmp_path / "rank2.error.json").read_text())["time"] <= time.time()
    found = first_cause({2: 1}, tmp_path, seen=0.0)
    assert (found.rank, found.message, found.is_job) == (2, message, is_job)
    assert "Traceback" in found.details and "in raised" in found.details


def test_the_later_of_two_real_errors_is_not_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_LOGS", str(tmp_path))
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        leave_error(raised(ValueError(f"of {rank}")))
        time.sleep(0.01)
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=0.0).rank == 1


def test_without_a_launcher_a_rank_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYBRID_LOGS", raising=False)
    monkeypatch.chdir(tmp_path)
    leave_error(ValueError("x"))
    assert not list(tmp_path.iterdir())
