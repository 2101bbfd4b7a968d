"""This module ends a rank whose launcher is gone, so that no process outlives its run.

It works on Linux alone and needs no torch."""

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from .stopping import saves_at_signals

_LAUNCHERS = {
    *("torchrun", "torch.distributed.run", "accelerate", "accelerate.commands.launch"),
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("mpirun", "mpirun.openmpi", "mpirun.mpich", "mpiexec", "mpiexec.hydra"),
}
SAVING_S = 30  # in which a rank whose launcher is gone may save its state
_PDEATHSIG = 1  # PR_SET_PDEATHSIG, prctl(2)


def end_with_launcher(started_by: int | None = None) -> None:
    """Have this rank end when the launcher that started it dies and so cannot end it any more.

    The kernel ends the rank with its parent. deepspeed's and accelerate's launchers start other
    processes in between, so a thread watches the launchers further up. `started_by`: the process id
    of the `hybrid` that started this rank, where it is known; the process that forks ranks for it
    may stand in between."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    end_with_parent(parent)
    if started_by not in (None, parent, _parent_of(parent)):
        os._exit(1)  # it died before the call above
    above = _launchers_above(parent)
    if above:
        threading.Thread(target=_watch, args=(above,), name="launcher", daemon=True).start()


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent, of this process id, ends."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before the call above


def _parent_of(pid: int) -> int | None:
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return None


def _launchers_above(pid: int) -> list[psutil.Process]:
    """Return the unbroken chain of launcher processes above our parent process `pid`."""
    try:
        return list(itertools.takewhile(_is_launcher, psutil.Process(pid).parents()))
    except psutil.Error:  # the parent is gone: the kernel ends this rank
        return []


def _is_launcher(process: psutil.Process) -> bool:
    """Tell whether a process runs a launcher, as its program or as the module that Python runs."""
    try:
        words = [Path(word).name for word in process.cmdline()]
    except psutil.Error:
        return False
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    return any(word in _LAUNCHERS for word in [*words[:2], *modules])


def _watch(above: list[psutil.Process]) -> None:
    while True:
        time.sleep(1)
        for process in above:
            if not _is_alive(process):
                with contextlib.suppress(OSError):  # the launcher may have read our stderr
                    line = f"hybrid: the launcher (process {process.pid}) is gone: ending"
                    print(line, file=sys.stderr)
                if saves_at_signals():
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(SAVING_S)
                os._exit(1)


def _is_alive(process: psutil.Process) -> bool:
    """Tell whether a process lives; psutil knows by its start time if another has its number."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
