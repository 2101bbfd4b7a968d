"""This module keeps a warm process, from which the ranks of several runs are forked.

Importing torch, accelerate and deepspeed takes each rank 2 to 5 s of CPU. The warm process imports
them once (`hybrid.launch.fork_server`). Where a rank cannot be forked, it is started afresh, with a
word on stderr. The module needs no torch."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..job.given import given_functions
from .environment import without_launcher
from .fork_here import ForkedHere, Polled, fork_warm_process
from .fork_server import MESSAGE_BYTES
from .interpreter import start_words

FILLER = " " * 4096  # room for the ranks' own command lines
# What the libraries read while they are imported. One thread until the fork, since a fork has only
# the thread that made it; waiting threads that do not spin; no CUDA before the fork
# (https://docs.pytorch.org/docs/stable/notes/cuda.html, PYTORCH_NVML_BASED_CUDA_CHECK).
VARIABLES = {"OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_NO_MEANING = {"PYTEST_CURRENT_TEST"}  # a variable that changes between runs and that no rank reads


class ServerGone(Exception):
    """Says that the warm process has ended."""


class Rank(Polled):
    """Is a rank that the warm process forked, with what `subprocess.Popen` offers of it."""

    what = "a rank"

    def __init__(self, server: "WarmProcess", pid: int) -> None:
        self.server, self.pid = server, pid

    def poll(self) -> int | None:
        """Return the exit code as `subprocess` gives it, None while the rank runs."""
        self.server.look()
        return self.server.codes[self.pid]


class WarmProcess:
    """Starts the process that forks ranks, and speaks with it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = _environment()
        self.functions = given_functions()
        self.codes: dict[int, int | None] = {}
        self.process: subprocess.Popen[bytes] | ForkedHere
        # A fork has none of the threads that torch computes with, once it has started them.
        self.warned = False
        self.one_thread = bool(self.functions) and "torch" in sys.modules
        variables = VARIABLES | {"OMP_WAIT_POLICY": wait_policy()}
        with theirs:
            if self.functions:
                self.process = fork_warm_process(theirs, variables)
            else:
                program = sys.executable, "-m", f"{__package__}.fork_server"
                self.process = subprocess.Popen(
                    [*start_words(program), str(theirs.fileno()), FILLER],
                    env=without_launcher() | variables,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
        self.socket = ours

    def fits(self) -> bool:
        """Tell whether the process lives, and has the variables and functions of a new one."""
        alike = self.environment == _environment() and self.functions == given_functions()
        return self.process.poll() is None and alike

    def fork(
        self,
        program: Sequence[str],
        arguments: Sequence[str],
        variables: Mapping[str, str],
        log: Path,
        modules: Sequence[str],
        held: socket.socket | None = None,
    ) -> Rank:
        """Fork a rank that runs `program arguments` with these variables beside the process's own.

        program: what follows `python` on a command line. modules: imported before the fork.
        held: a socket that the rank gets too. Raises ServerGone."""
        request = {
            "program": list(program),
            "arguments": list(arguments),
            "variables": dict(variables) | self._threads(variables),
            "folder": os.getcwd(),
            "log": str(log.absolute()),
            "modules": list(modules),
        }
        try:
            self._send(request, [held.fileno()] if held else [])
            while (answer := self._receive()) is not None:
                if "code" not in answer:
                    self.codes[answer["pid"]] = None
                    return Rank(self, answer["pid"])
        except BaseException:  # such as Ctrl-C: nobody would know of the rank
            self.process.kill()
            raise
        raise ServerGone

    def _threads(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Return the number of threads where the ranks cannot have that of `variables`."""
        asked = variables.get("OMP_NUM_THREADS", "1")
        if not self.one_thread or asked == "1":
            return {}
        if not self.warned:
            self.warned = True
            print(
                f"hybrid: warning: ranks have one thread in place of {asked}, since they are forks "
                "of this process, which has imported torch",
                file=sys.stderr,
            )
        return {"OMP_NUM_THREADS": "1"}

    def prepare(self, modules: Sequence[str]) -> None:
        """Import modules that ranks will need, and do not wait for it."""
        self._send({"modules": list(modules)})

    def _send(self, request: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
        with contextlib.suppress(BrokenPipeError):  # `fork` sees that the process is gone
            socket.send_fds(self.socket, [json.dumps(request).encode()], descriptors)

    def look(self) -> None:
        """Take the exit codes that have come since the last look."""
        with contextlib.suppress(BlockingIOError):
            while self._receive(socket.MSG_DONTWAIT):
                pass

    def _receive(self, flags: int = 0) -> dict[str, int] | None:
        """Return the next message, None if the process has ended: then its ranks have too."""
        with contextlib.suppress(ConnectionResetError):
            if message := self.socket.recv(MESSAGE_BYTES, flags):
                answer: dict[str, int] = json.loads(message)
                if "code" in answer:
                    self.codes[answer["pid"]] = answer["code"]
                return answer
        for pid, code in self.codes.items():
            self.codes[pid] = -signal.SIGKILL if code is None else code
        return None

    def close(self) -> None:
        """End the process, which may still import. Its ranks must have ended."""
        self.socket.close()
        self.process.kill()
        self.process.wait()


def wait_policy() -> str:
    """Return how OpenMP's threads wait for one another, unless the user has said it.

    By default they spin. On a busy host that took 139 ms of CPU a step, where 6 were needed."""
    return os.environ.get("OMP_WAIT_POLICY", "PASSIVE")


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in _NO_MEANING}


class _Holder:
    """Holds the one warm process of a command, once it is needed."""

    process: WarmProcess | None = None

    def get(self) -> WarmProcess:
        """Return the process, a new one if the old one no longer fits."""
        if self.process and not self.process.fits():
            self.close()
        if self.process is None:
            self.process = WarmProcess()
        return self.process

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process:
            self.process.close()
        self.process = None


_holder: ContextVar[_Holder | None] = ContextVar("holder", default=None)


@contextlib.contextmanager
def warm_ranks(fresh: bool = False) -> Iterator[None]:
    """Fork all ranks from one warm process while the context lasts; the outermost one ends it.

    fresh: start each rank afresh instead."""
    if _holder.get() is not None and not fresh:
        yield
        return
    holder = None if fresh or sys.platform != "linux" else _Holder()
    token = _holder.set(holder)
    try:
        yield
    finally:
        _holder.reset(token)
        if holder:
            holder.close()


def warm_process() -> WarmProcess | None:
    """Return the warm process of the context, None where ranks are started afresh."""
    holder = _holder.get()
    return holder.get() if holder else None
