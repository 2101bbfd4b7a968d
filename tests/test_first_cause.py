"""Of several ranks that ended badly, the one named is the one that began it."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from hybrid.job.errors import Failure, JobError, RunFailed, Unsupported
from hybrid.launch import heartbeat
from hybrid.launch.failures import RankStatus, leave_error
from hybrid.launch.first_cause import first_cause
from hybrid.launch.lost_peers import PEER_LOSS_MESSAGES, is_peer_loss
from hybrid.launch.placement import Placement
from hybrid.layout import LayoutError
from tests.conftest import small_job

LOST = "DistBackendError: [../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4321"


def leave(logs: Path, rank: int, at: float, message: str, kind: str = "error") -> None:
    """What a rank that raises leaves behind."""
    what = {"time": at, "message": message, "details": f"trace of {rank}", "kind": kind}
    what["cause"] = None
    (logs / f"rank{rank}.error.json").write_text(json.dumps(what))


def here(rank: int = 0, logs: Path | None = None) -> RankStatus:
    """The status of a rank of three that has just started."""
    return RankStatus(small_job(), Placement(rank, 3, rank, "hybrid"), logs)


def log(logs: Path, rank: int, text: str = "") -> None:
    """What a rank printed."""
    (logs / f"rank{rank}.log").write_text(text)


def test_the_earliest_raise_wins_whatever_its_rank(tmp_path: Path) -> None:
    leave(tmp_path, 0, 12.0, "ValueError: second")
    leave(tmp_path, 1, 11.0, "RuntimeError: first")
    leave(tmp_path, 2, 13.0, "ValueError: third")
    found = first_cause({0: 1, 1: 1, 2: 1}, tmp_path, seen=20.0)
    assert found == Failure(1, "RuntimeError: first", "trace of 1", "error")


def test_a_mistake_that_rank_0_tells_all_is_its_own(tmp_path: Path) -> None:
    leave(tmp_path, 0, 12.0, "model.name = 'x': gone", "job")
    leave(tmp_path, 2, 11.0, "model.name = 'x': gone", "job")
    leave(tmp_path, 1, 13.0, "model.name = 'x': other", "job")
    assert first_cause({0: 2, 1: 2, 2: 2}, tmp_path, seen=20.0).rank == 0


def test_how_gloo_and_its_store_word_a_lost_peer() -> None:
    store = "Failed to recv, got 0 bytes. Connection was likely closed. Did the server shutdown?"
    for said in (LOST, store, "Read error [127.0.0.1]:80: Connection reset by peer"):
        assert is_peer_loss(said), said


@pytest.mark.parametrize("words", PEER_LOSS_MESSAGES)
def test_a_lost_connection_comes_last_even_when_it_is_earlier(words: str, tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, f"RuntimeError: connection: {words}")
    leave(tmp_path, 1, 2.0, "ValueError: the cause")
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=3.0).message == "ValueError: the cause"


def test_a_killed_rank_beats_the_connections_it_broke(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, LOST)
    leave(tmp_path, 2, 1.1, LOST)
    log(tmp_path, 1, "last words")
    found = first_cause({0: 1, 1: -signal.SIGKILL, 2: 1}, tmp_path, seen=5.0)
    assert (found.rank, found.details) == (1, "last words")
    assert found.message.startswith("was ended by SIGKILL") and "memory" in found.message


def test_of_lost_connections_alone_the_earliest_is_named(tmp_path: Path) -> None:
    leave(tmp_path, 0, 2.0, LOST)
    leave(tmp_path, 1, 1.0, LOST)
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=3.0).rank == 1


GLOO = (
    "[enforce fail at pair.cc:456] op.preamble.length <= op.nbytes. 724 vs 568. Is there a "
    "distributed collective mismatch in your code?"
)
ABORT = f"""terminate called after throwing an instance of 'gloo::EnforceNotMet'
  what():  {GLOO}
"""


def test_a_rank_that_a_library_aborts_is_told_in_the_librarys_words(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, LOST)
    log(tmp_path, 1, "first words\n" + ABORT + "".join(f"frame #{i}: x\n" for i in range(90)))
    found = first_cause({0: 1, 1: -signal.SIGABRT}, tmp_path, seen=5.0)
    assert found.message == f"was ended by SIGABRT: {GLOO} (starting)"
    log(tmp_path, 1, ABORT)  # not the last words of a rank that ended otherwise
    found = first_cause({0: 1, 1: -signal.SIGTERM}, tmp_path, seen=5.0)
    assert found.message == "was ended by SIGTERM (starting)"


def test_the_loss_of_the_meeting_point_is_an_effect(tmp_path: Path) -> None:
    """Rank 0 holds it. Where that is killed, another rank says so at once, before it is seen."""
    lost = "RuntimeError: store: gone or cut off, and with it the meeting point of the run"
    leave(tmp_path, 1, 1.0, lost)
    log(tmp_path, 0)
    found = first_cause({0: -signal.SIGABRT, 1: 1}, tmp_path, seen=2.0)
    assert (found.rank, found.message) == (0, "was ended by SIGABRT (starting)")


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
    assert found.message == "exited with 7 (starting)"
    assert found.details.splitlines() == [f"line {i}" for i in range(30, 50)]


def test_a_log_that_is_not_text_is_shown_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_bytes(b"\xff\xfe end")
    assert first_cause({0: 1}, tmp_path, seen=1.0).details.endswith("end")


def test_an_error_of_the_job_stays_one(tmp_path: Path) -> None:
    leave(tmp_path, 0, 1.0, "train.steps = 0: wrong", kind="job")
    leave(tmp_path, 1, 2.0, LOST)
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=3.0).kind == "job"


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
    ("error", "message", "kind"),
    [
        (ValueError("one\ntwo"), "ValueError: one (starting)", "error"),
        (RuntimeError(), "RuntimeError (starting)", "error"),
        (JobError("model.name = 'x': unknown"), "model.name = 'x': unknown", "job"),
        (LayoutError("2 x 2 is not 3"), "2 x 2 is not 3", "job"),
        (Unsupported("two tensors"), "two tensors", "unsupported"),
    ],
)
def test_what_a_rank_leaves_is_what_the_launcher_reads(
    error: Exception,
    message: str,
    kind: str,
    tmp_path: Path,
) -> None:
    before = time.time()
    leave_error(raised(error), here(2, tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"rank2.error.json", "rank2.where"}
    assert before <= json.loads((tmp_path / "rank2.error.json").read_text())["time"] <= time.time()
    found = first_cause({2: 1}, tmp_path, seen=0.0)
    said, at, line = found.message.partition(", at ")
    assert (found.rank, said, found.kind) == (2, message, kind)
    if kind == "error":  # the line that is not the toolkit's own
        number = raised.__code__.co_firstlineno + 3
        log = f"(log: {tmp_path / 'rank2.log'})"
        assert line == f"tests/test_first_cause.py:{number} {log}" and at
    assert "Traceback" in found.details and "in raised" in found.details


def test_the_later_of_two_real_errors_is_not_the_cause(tmp_path: Path) -> None:
    for rank in (1, 0):
        leave_error(raised(ValueError(f"of {rank}")), here(rank, tmp_path))
        time.sleep(0.01)
    assert first_cause({0: 1, 1: 1}, tmp_path, seen=0.0).rank == 1


def test_without_a_folder_a_rank_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    leave_error(ValueError("x"), here())
    assert not list(tmp_path.iterdir())


def test_a_rank_without_room_for_a_thread_still_tells_its_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", start)
    assert heartbeat._bounded(lambda: "told", None) == "told"
