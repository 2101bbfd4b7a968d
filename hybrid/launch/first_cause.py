"""This module finds which of several failures of a run's ranks came first.

It reads what the ranks left in `OUT/logs`: `rankN.error.json` (`hybrid.launch.failures`), what they
thought of each other while they waited (`hybrid.launch.stall`), their logs, and what each said last
that it was doing. It needs no torch."""

import contextlib
import dataclasses
import json
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..job.errors import NO_ROOM, Failure
from .blame import STARTING, unlike_rank
from .failures import HAS_ENDED
from .heartbeat import pick_line
from .lost_peers import NO_MEETING, effect_in, is_mismatch, is_peer_loss

_SAID_LAST = 2**16  # bytes at the end of a log, in which the C++ library says why it aborts
_WHAT = re.compile(r"^\s*what\(\):\s+(.+)$", re.MULTILINE)
_MISSING = re.compile(r"ranks (\d+)[\d, ]* of \d+ did not start within")  # `StartError`
TAIL_LINES = 20  # of a log, where a rank left nothing else


def first_cause(dead: dict[int, int], logs: Path, seen: float) -> Failure:
    """Return the first failure of the ranks that ended badly, given as rank to exit code.

    `seen`: when (in seconds of `time.time`) the launcher saw that a rank had ended. A rank that
    left no error file failed then; a lost connection to another rank counts last."""
    found: list[tuple[bool, float, Failure]] = []
    for rank, code in dead.items():
        if left := left_by(rank, logs):
            who, message = rank, left["message"]
            if cause := left["cause"]:
                who = cause["rank"]
                message = f"{cause['message']} ({_where(logs, who)}){cause.get('line', '')}"
            failure = Failure(who, message, left["details"], left["kind"])
            lost = left.get("effect", True) and is_peer_loss(failure.message)
            found.append((lost, left["time"], failure))
        else:
            failure = _without_words(rank, code, logs)
            found.append((is_peer_loss(failure.message), seen, failure))
    lost, _, first = min(found, key=lambda f: f[:2])
    if first.kind not in ("error", "stopped"):  # all ranks may raise the mistake that one found
        alike = (failure for *_, failure in found if failure.message == first.message)
        first = min(alike, key=lambda failure: failure.rank)
    if NO_MEETING in first.message and 0 not in dead and _where(logs, 0) == STARTING:
        # Rank 0 opens the meeting, and another one that looks elsewhere would let it wait there.
        return Failure(0, f"did not come to the meeting of ranks: {first.message}", first.details)
    if missing := _MISSING.search(first.message):
        return dataclasses.replace(first, rank=int(missing[1]))
    if is_mismatch(first.message) and (odd := _unlike(dead, logs, first)):
        return odd
    return (_suspected(logs, first.details) or _deadlock(dead, logs, first)) if lost else first


def _deadlock(dead: Iterable[int], logs: Path, first: Failure) -> Failure:
    """Return the failure of ranks that waited for one another, with the line of each."""
    lines = _lines(dead, logs)
    if "Timed out waiting" not in first.message or len(lines) < 2:
        return first
    told = ", ".join(f"rank {rank} at {line}" for rank, line in sorted(lines.items()))
    return dataclasses.replace(first, message=f"{first.message}; all waited: {told}")


def _unlike(dead: Iterable[int], logs: Path, first: Failure) -> Failure | None:
    """Return the failure of the one rank that called another collective than all others."""
    found = unlike_rank(_lines(dead, logs))
    if found is None:
        return None
    rank, message = found
    return Failure(rank, f"{message} ({_where(logs, rank)})", first.details)


def _lines(dead: Iterable[int], logs: Path) -> dict[int, str]:
    """Return the lines where ranks failed, as far as they left them."""
    lines = dict[int, str]()
    for rank in dead:
        left = left_by(rank, logs) or {}
        if line := left.get("at") or _aborted_at(read_log(logs / f"rank{rank}.log")):
            lines[rank] = line
    return lines


def _aborted_at(log: str) -> str:
    """Return the line of the main thread by Python's faulthandler, empty where it said nothing."""
    _, fatal, text = log[-_SAID_LAST:].rpartition("Fatal Python error: ")
    *_, main = re.split(r"^(?:Current t|T)hread 0x", text, flags=re.MULTILINE)
    frames = re.findall(r'^  File "(.+)", line (\d+)', main, re.MULTILINE)
    return pick_line((file, int(number)) for file, number in frames) if fatal else ""


def left_by(rank: int, logs: Path) -> dict[str, Any] | None:
    """Return what a rank that failed left in its error file, None where it left none."""
    path = logs / f"rank{rank}.error.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_log(path: Path) -> str:
    """Return the text of a log, empty where it cannot be read."""
    with contextlib.suppress(OSError):  # on a full disk there may be none
        return path.read_text(errors="replace")
    return ""


def _suspected(logs: Path, details: str) -> Failure | None:
    """Return what ranks said of another one while they still waited for it, the earliest first."""
    found = []
    for file in logs.glob("rank*.waits.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append((file.stat().st_mtime, json.loads(file.read_text())))
    if not found:
        return None
    cause = min(found, key=lambda f: f[0])[1]
    return Failure(cause["rank"], f"{cause['message']} ({cause['where']})", details)


def _without_words(rank: int, code: int, logs: Path) -> Failure:
    """Return the failure of a rank that left no error file: by its exit code and its log."""
    log, doing = read_log(logs / f"rank{rank}.log"), _where(logs, rank)
    tail = "\n".join(log.splitlines()[-TAIL_LINES:])
    if NO_ROOM in doing:
        return Failure(rank, doing, tail, "room")
    said = list[str]()
    if code == -signal.SIGABRT:  # by a library, which says why
        effect = effect_in(log[-_SAID_LAST:])
        said = [effect] if effect else _WHAT.findall(log[-_SAID_LAST:])
    message = how_it_ended(code) + (f": {said[-1].strip()}" if said else "")
    if code == 0:
        message += " before the end of its run, in a call of os._exit or the like"
    at = _aborted_at(log) if code < 0 else ""
    return Failure(rank, f"{message} ({doing})" + (f", at {at}" if at else ""), tail)


def _where(logs: Path, rank: int) -> str:
    """Return what a rank said last that it was doing."""
    path = logs / f"rank{rank}.where"
    return path.read_text(errors="replace").strip() if path.exists() else STARTING


def how_it_ended(code: int) -> str:
    """Say in words what a rank's exit code means."""
    if code >= 0:
        return f"exited with {code}"
    if -code == signal.SIGKILL:
        return "was ended by SIGKILL, by which the system also ends what takes too much memory"
    return f"was ended by {signal.Signals(-code).name}"


def names_missing(message: str) -> bool:
    """Tell whether a message names ranks that did not come to the meeting."""
    return bool(_MISSING.search(message))


def left_early(rank: int, logs: Path) -> bool:
    """Tell whether a rank that left with status 0 had not done all of its work."""
    return _where(logs, rank) != HAS_ENDED
