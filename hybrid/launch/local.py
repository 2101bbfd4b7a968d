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

from ..job.errors import Failure, RunFailed
from .failures import first_cause
from .heartbeat import is_peer_loss
from .threads import num_cores
from .warm import Rank, ServerGone, wait_policy, warm_process

Started = subprocess.Popen[bytes] | Rank
Ranks = list[Started]
Program = Sequence[str]
PROGRAM: Program = (sys.executable, "-m", "hybrid")
GRACE_S = 3.0  # between SIGTERM and SIGKILL, for ranks to flush their logs
POLL_S = 0.02
PATIENCE_S = 8.0  # for ranks that still run and may know the cause


def run_ranks(
    nproc: int,
    arguments: Sequence[str],
    out: Path,
    on_poll: Callable[[], None] | None = None,
    program: Program = PROGRAM,
    modules: Sequence[str] = (),
    cores_for: int | None = None,
) -> None:
    """Run `program arguments` as `nproc` ranks until all have ended well, and call `on_poll` often.

    modules: what a warm process imports before it forks them. cores_for: a rank has the threads
    that each of so many would have; left out, of `nproc`. Raises RunFailed as soon as a rank has
    ended badly. No rank is left running."""
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("rank*"):
        old.unlink()
    ranks: Ranks = []
    try:
        port = _free_port()
        for rank in range(nproc):
            variables = _variables(rank, nproc, port, cores_for or nproc)
            log = logs / f"rank{rank}.log"
            ranks.append(_start(program, arguments, variables, log, modules))
        _wait(ranks, logs, on_poll)
    finally:
        end(ranks)


def _start(
    program: Program,
    arguments: Sequence[str],
    variables: dict[str, str],
    log: Path,
    modules: Sequence[str],
) -> Started:
    """Fork a rank from the warm process, or start it afresh where that is not possible."""
    warm = warm_process() if program[0] == sys.executable else None
    if warm:
        try:
            return warm.fork(program[1:], arguments, variables, log, modules)
        except ServerGone:
            print("hybrid: the warm process has ended: ranks start afresh", file=sys.stderr)
    with log.open("wb") as file:
        return subprocess.Popen(
            [*program, *arguments],
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the ranks
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _variables(rank: int, nproc: int, port: int, cores_for: int) -> dict[str, str]:
    """Return what a rank's environment has beside the variables of this process."""
    found = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": nproc,
        "LOCAL_WORLD_SIZE": nproc,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        # More threads than cores made two ranks 17 times slower; a user's own setting stands.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, num_cores() // cores_for)),
        "OMP_WAIT_POLICY": wait_policy(),
        "PYTHONUNBUFFERED": 1,  # a killed rank's log has its last words
    }
    return {key: str(value) for key, value in found.items()}


def _wait(ranks: Ranks, logs: Path, on_poll: Callable[[], None] | None) -> None:
    while True:
        codes = [rank.poll() for rank in ranks]
        if on_poll:
            on_poll()
        if any(codes):
            raise RunFailed(_await_cause(ranks, logs, time.time()))
        if all(code == 0 for code in codes):
            return
        time.sleep(POLL_S)


def _await_cause(ranks: Ranks, logs: Path, seen: float) -> Failure:
    """Return the first cause, once ranks that fail in the same moment have left their errors too.

    It waits longer while a lost connection is all that is known, since that is only an effect."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        time.sleep(0.2)
        dead = {i: code for i, r in enumerate(ranks) if (code := r.poll())}
        failure = first_cause(dead, logs, seen)
        enough = len(dead) == len(ranks) or time.monotonic() > deadline
        if enough or not is_peer_loss(failure.message):
            return failure


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
