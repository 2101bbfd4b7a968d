"""Has one rank fail in one way, then runs the command: `failing.py FAULT@RANK train ...`.

Without `@RANK` it is rank 1. Each fault is what happens to ranks of long runs; how a run ends then
is held against what is promised by tests/test_failures.py, and by benchmarks/faults.py under
several strategies.
"""

from __future__ import annotations

import os
import pkgutil
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybrid.launch.held_port import take_held_port

IN_STEP = 2
GUILTY = 1  # the rank that fails; `main` sets it


def raises() -> None:
    """An error of the model's, after words from Python and words as C++ prints them."""

    def act() -> None:
        print("planted: Python's words")
        os.write(1, b"planted: C's words\n")
        raise RuntimeError("planted: the sky fell")

    _in_step(act)


def raises_while_others_sleep() -> None:
    """The others are not in a collective when the launcher ends them for the one that raises."""
    _in_step(lambda: time.sleep(60), but=True)
    raises()


def raises_and_others_are_ended() -> None:
    """The launcher ends the others while they ask why they have lost the one that raises."""
    from hybrid.launch.heartbeat import Heartbeat

    ask = Heartbeat.first_cause

    def first_cause(self: Heartbeat) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return ask(self)

    Heartbeat.first_cause = first_cause  # type: ignore[method-assign]
    raises()


def is_killed() -> None:
    """As the kernel does when a host has no memory left."""

    def act() -> None:
        print("planted: last words")
        os.kill(os.getpid(), signal.SIGKILL)

    _in_step(act)


def has_no_memory() -> None:
    """More is asked for than there is: 4 PiB."""
    import torch

    _in_step(lambda: torch.empty(2**50))


def is_stopped() -> None:
    """It hangs, and not even its threads run."""
    _in_step(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def falls_behind() -> None:
    """It lives, and does something else while the others wait for it."""
    _in_step(lambda: time.sleep(100_000))


def sleeps_in_forward() -> None:
    """The model's own code does not return."""
    _in_call("torch.nn", "Linear.forward", lambda: time.sleep(100_000))


def sleeps_in_getitem() -> None:
    """The data set's own code does not return."""
    _in_call("hybrid.data.steps", "load_micro_batch", lambda: time.sleep(100_000))


def sleeps_in_loss() -> None:
    """The loss does not return."""
    _in_call("torch.nn.functional", "cross_entropy", lambda: time.sleep(100_000))


def loops_in_python() -> None:
    """An endless loop, in which Python's other threads run."""

    def act() -> None:
        while True:
            pass

    _in_call("torch.nn", "Linear.forward", act)


def loops_in_c() -> None:
    """An endless loop in C that keeps Python's lock: no other thread runs."""
    _in_call("torch.nn", "Linear.forward", lambda: re.match("(a+)+$", "a" * 99 + "b"))


def skips_a_collective() -> None:
    """Three ranks exchange something, and the fourth one does not."""

    def act() -> None:
        import torch
        import torch.distributed as dist

        if _rank() != GUILTY:
            dist.all_reduce(torch.ones(7919))

    _in_step(act, everywhere=True)


def dies_once() -> None:
    """It is killed in torchrun's first attempt alone. Rank 0 then comes late to the second, so that
    the first attempt's keys would be all that rank 1 finds in torchrun's store."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        _in_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif _rank() == 0:
        time.sleep(3)


def never_starts() -> None:
    """It does not come to the meeting."""
    if _rank() == GUILTY:
        _mark()
        time.sleep(100_000)


def goes_elsewhere() -> None:
    """It looks for the others where nobody is."""
    if _rank() == GUILTY:
        _mark()
        os.environ["MASTER_PORT"] = "9"  # the discard service's, which no machine runs


def port_is_taken() -> None:
    """Another program listens where rank 0 means to, which has lost the port that it had."""
    if _rank() == 0:
        if (held := take_held_port()) is not None:
            os.close(held)
        _mark()
        listener = socket.socket()
        listener.bind(("0.0.0.0", int(os.environ["MASTER_PORT"])))
        listener.listen()
        globals()["kept"] = listener


def nothing() -> None:
    """No fault: for runs that are ended from outside."""


def _rank() -> int:
    return int(os.environ["RANK"])  # an engine may have set others of its kind since


def _in_step(act: Callable[[], Any], everywhere: bool = False, but: bool = False) -> None:
    """Do it when the step begins. everywhere: on all ranks. but: on all except the guilty one."""
    from hybrid.measure.clock import Instruments

    enter = Instruments.step

    def step(self: Any, number: int, make: Callable[[], None]) -> None:
        if number == IN_STEP and (everywhere or (_rank() == GUILTY) != but):
            _mark()
            act()
        enter(self, number, make)

    Instruments.step = step  # type: ignore[method-assign]


def _mark() -> None:
    """Leave a file in OUT when the fault comes, whose time is the fault's."""
    if "--out" in sys.argv:
        Path(sys.argv[sys.argv.index("--out") + 1], "fault").touch()


def _in_call(module: str, name: str, act: Callable[[], Any]) -> None:
    """Do it in the first call of a function once the step has begun."""
    armed = [False]
    _in_step(lambda: armed.__setitem__(0, True))
    found: Any = pkgutil.resolve_name(module)
    *owners, last = name.split(".")
    for owner in owners:
        found = getattr(found, owner)
    call = getattr(found, last)

    def called(*args: Any, **kwargs: Any) -> Any:
        if armed[0]:
            armed[0] = False
            act()
        return call(*args, **kwargs)

    setattr(found, last, called)


def main() -> None:
    """The command, whose ranks come back to this file."""
    global GUILTY
    word = sys.argv.pop(1)
    fault, _, guilty = word.partition("@")
    GUILTY = int(guilty or GUILTY)
    from hybrid.launch.environment import launcher_name
    from hybrid.training import run

    if launcher_name() is None:
        run.PROGRAM = [sys.executable, __file__, word]
    elif "single" not in sys.argv:  # the reference stays whole
        globals()[fault]()
    from hybrid.cli import main

    main()


if __name__ == "__main__":
    main()
