"""This module forks the warm process from this one, so that ranks have all that this one has.

Ranks need that where a caller in Python, such as a notebook, gives functions that no other process
can import. The fork leaves alone what belongs to the caller: its terminal, its signal handlers,
what it does at exit. It works on Linux alone, and not once this process has used a GPU."""

import atexit
import contextlib
import gc
import io
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from typing import Any

from . import fork_server
from .environment import without_launcher

# What has to run when a process ends, of those modules that a process forked here may use.
_AT_EXIT = {
    "multiprocessing.util": "_exit_function",
    "torch.utils.data._utils": "_set_python_exit_flag",
}


def why_not(fresh: bool = False) -> str:
    """Say why no rank can be forked from this process, empty if it can. fresh: it must not be."""
    torch: Any = sys.modules.get("torch")
    if fresh:
        return "each rank is to start afresh"
    if sys.platform != "linux":
        return "processes are forked on Linux alone"
    if torch and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        return "this process has used the GPU and so cannot be forked"
    return ""


class Polled:
    """Is a process that is asked again and again whether it has ended."""

    what: str  # it is, in an error

    def poll(self) -> int | None:
        """Return the exit code as `subprocess` gives it, None while the process runs."""
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code; raises `subprocess.TimeoutExpired`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.what, timeout or 0.0)
            time.sleep(0.01)
        return code


class ForkedHere(Polled):
    """Is a child of this process, with what `subprocess.Popen` offers of it."""

    what = "the warm process"

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code as `subprocess` gives it, None while the process runs."""
        if self.code is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # another part of this process has waited for it
                ended, status = self.pid, 1
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def kill(self) -> None:
        """End the process with SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def fork_warm_process(control: socket.socket, variables: Mapping[str, str]) -> ForkedHere:
    """Fork a process that serves requests on `control`, with these variables beside our own."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if child:
        return ForkedHere(child)
    try:
        gc.freeze()  # what the caller's other threads were at is never to be looked through here
        _let_go_of_the_caller()
        for key in os.environ.keys() - without_launcher().keys():
            del os.environ[key]
        os.environ.update(variables)
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # OpenMP's other threads are not in a fork, which would wait
        fork_server.serve(control, here=True)
    finally:
        os._exit(1)


def _let_go_of_the_caller() -> None:
    """Give up what belongs to the caller alone: terminal, signals, what it does at exit."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    # Else each rank would do what the caller means to do once, such as to remove its folders.
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    atexit._clear()
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
    if children := sys.modules.get("multiprocessing.process"):
        children._children.clear()
    if util := sys.modules.get("multiprocessing.util"):
        util._finalizer_registry.clear()
        util._run_after_forkers()
    for module, function in _AT_EXIT.items():
        if found := getattr(sys.modules.get(module), function, None):
            atexit.register(found)
