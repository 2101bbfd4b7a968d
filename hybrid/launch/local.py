"""This module starts the ranks of a run on this machine, watches them, and finds what failed first.

Each rank is a `python -m hybrid train ...` with the variables that torchrun would set, forked from
a warm process where there is one (`hybrid.launch.warm`). Its output goes to `OUT/logs/rankN.log`;
a rank that raises leaves `OUT/logs/rankN.error.json` (`hybrid.launch.failures`). The first cause is
the earliest by time; a lost connection to a peer that died counts last. The module needs no torch.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..job.errors import Failure, RunFailed, Stopped
from ..records.whole import new_file
from .environment import without_launcher
from .first_cause import first_cause, left_early, names_missing
from .held_port import LOOPBACK, VARIABLE, hold_port
from .interpreter import start_words
from .limits import check_processes
from .logs import list_logs
from .lost_peers import is_mismatch, is_peer_loss
from .stopping import SIGNALS, STOPPED, PassedOn, told
from .threads import num_cores
from .warm import Rank, ServerGone, wait_policy, warm_process

Started = subprocess.Popen[bytes] | Rank
Ranks = list[Started]
Program = Sequence[str]
PROGRAM: Program = (sys.executable, "-m", "hybrid")
GRACE_S = 3.0  # between SIGTERM and SIGKILL, for ranks to flush their logs
POLL_S = 0.02
PATIENCE_S = 8.0  # for ranks that still run and may know the cause
MEETING_S = 3.0  # for one that looked elsewhere, where others say that it did not start


def run_ranks(
    nproc: int,
    arguments: Sequence[str],
    out: Path,
    on_poll: Callable[[], None] | None = None,
    program: Program = PROGRAM,
    modules: Sequence[str] = (),
    cores_for: int | None = None,
    stops: bool = False,
    says_end: bool = False,
) -> None:
    """Run `program arguments` as `nproc` ranks until all have ended well, and call `on_poll` often.

    modules: what a warm process imports before it forks them. cores_for: a rank has the threads
    that each of so many would have; left out, of `nproc`. stops: the ranks save and leave at a
    signal, which is passed on to them; a second one ends them at once. says_end: a rank says when
    it has done its work (`RankStatus.end`), and has failed if it leaves before. Raises RunFailed as
    soon as a rank has ended badly, and Stopped where a signal was the cause. No rank is left
    running."""
    check_processes(nproc, "--nproc")
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in list_logs(logs):  # no other file is ours
        old.unlink()
    ranks: Ranks = []
    with PassedOn() if stops else contextlib.nullcontext():
        try:
            warm_process()  # made before the socket, it has no copy of it
            with hold_port() as held:
                port = held.getsockname()[1]
                for rank in range(nproc):
                    variables = _variables(rank, nproc, port, cores_for or nproc)
                    log = logs / f"rank{rank}.log"
                    theirs = held if rank == 0 else None
                    ranks.append(_start(program, arguments, variables, log, modules, theirs))
                    held.close()  # from now on rank 0 alone has it
            _wait(ranks, logs, on_poll, says_end)
        finally:
            end(ranks)


def _start(
    program: Program,
    arguments: Sequence[str],
    variables: dict[str, str],
    log: Path,
    modules: Sequence[str],
    held: socket.socket | None,
) -> Started:
    """Fork a rank from the warm process, or start it afresh where that is not possible.

    held: has the port where the ranks meet, for rank 0."""
    warm = warm_process() if program[0] == sys.executable else None
    if warm:
        try:
            return warm.fork(program[1:], arguments, variables, log, modules, held)
        except ServerGone:
            print("hybrid: the warm process has ended: ranks start afresh", file=sys.stderr)
    passed = [held.fileno()] if held else []
    if passed:
        variables = variables | {VARIABLE: str(passed[0])}
    with new_file(log) as file:
        return subprocess.Popen(
            [*start_words(program), *arguments],
            env=without_launcher() | variables,
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the ranks
        )


def _variables(rank: int, nproc: int, port: int, cores_for: int) -> dict[str, str]:
    """Return what a rank's environment has beside this process's, `without_launcher`."""
    found = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": port,
        # More threads than cores made two ranks 17 times slower; a user's own setting stands.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, num_cores() // cores_for)),
        "OMP_WAIT_POLICY": wait_policy(),
        "PYTHONUNBUFFERED": 1,  # a killed rank's log has its last words
    }
    return {key: str(value) for key, value in found.items()}


def _wait(ranks: Ranks, logs: Path, on_poll: Callable[[], None] | None, says_end: bool) -> None:
    passed_on = 0
    while True:
        codes = [rank.poll() for rank in ranks]
        if on_poll:
            on_poll()
        if _dead(codes, logs, says_end):
            failure = _await_cause(ranks, logs, time.time(), says_end)
            if failure.kind == "stopped" or (passed_on and _is_by_signal(failure.message)):
                _await_all(ranks)
                raise Stopped(_how_stopped(failure), passed_on or signal.SIGTERM)
            raise RunFailed(failure)
        if told() and not passed_on:
            passed_on = told()
            for rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, passed_on)  # and not its processes that load data
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL_S)


def _dead(codes: Sequence[int | None], logs: Path, says_end: bool) -> dict[int, int]:
    """Return the exit codes of the ranks that have ended badly: also with 0, before their end."""
    return {
        rank: code
        for rank, code in enumerate(codes)
        if code or (code == 0 and says_end and left_early(rank, logs))
    }


def _await_cause(ranks: Ranks, logs: Path, seen: float, says_end: bool) -> Failure:
    """Return the first cause, once ranks that fail in the same moment have left their errors too.

    It waits longer while a lost connection is all that is known, since that is only an effect."""
    began = time.monotonic()
    while True:
        time.sleep(0.2)
        codes = [rank.poll() for rank in ranks]
        failure = first_cause(_dead(codes, logs, says_end), logs, seen)
        patience_s = MEETING_S if names_missing(failure.message) else PATIENCE_S
        enough = None not in codes or time.monotonic() - began > patience_s
        if enough or not (is_peer_loss(failure.message) or is_mismatch(failure.message)):
            return failure


def _is_by_signal(message: str) -> bool:
    """Tell whether a rank ended by a signal for which it had no handler yet."""
    codes = [f"exited with {128 + number}" for number in SIGNALS]
    codes += [f"was ended by {number.name}" for number in SIGNALS]
    return message.startswith(tuple(codes))


def _how_stopped(failure: Failure) -> str:
    if failure.kind == "stopped":
        return failure.message
    return f"{STOPPED}{signal.Signals(told()).name} before the first step was saved"


def _await_all(ranks: Ranks) -> None:
    """Wait for ranks that leave together, since one may still write what it was doing."""
    deadline = time.monotonic() + PATIENCE_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def end(ranks: Sequence[Started]) -> None:
    """End every process with its process group: SIGTERM first, then SIGKILL."""
    for rank in ranks:
        _signal(rank, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        _signal(rank, signal.SIGKILL)
        rank.wait()


def _signal(rank: Started, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, number)
