"""This module holds a results folder, with all folders in it, for one command at a time.

A command that writes in OUT has an exclusive flock(2) on `OUT/hybrid.lock`, in which stands, as
JSON, who it is. The kernel gives the lock up when the command's process ends, also by `kill -9`. No
other process inherits it, so none keeps it. A rank that `hybrid` started has a lock of its own, on
its log: the next command waits for ranks that have not ended yet. Over NFS and the like this
protects as far as flock does there (Linux: NFS since 2.6.12, Lustre mounted with `-o flock`). A
file system without flock is warned of. The module needs no torch."""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from ..job.errors import JobError
from ..job.outputs import make_folder, makes, remove_folders
from ..records import PROXY, load_object

LOCK = "hybrid.lock"
LOOKS_S = 0.3  # in which another command that merely looks at the lock has let go of it
TOLD_S = 2.0  # in which other hosts see whose the lock is
ENDING_S = 10.0  # in which the ranks of a command that was killed have ended
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # no link, no wait for a FIFO's other end
_LOGS = ("logs/rank*.log", "*/logs/rank*.log", f"{PROXY}/*/logs/rank*.log")

# The process, and the folders that it holds in this context. A fork of it holds nothing.
_held: ContextVar[tuple[int, frozenset[Path]]] = ContextVar("held", default=(0, frozenset()))
_open = set[int]()  # descriptors that have a lock


def _let_go() -> None:
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def hold(folder: Path, launch: str = "") -> Iterator[None]:
    """Hold a folder, which is made where it is missing; what is in a held one is held already.

    launch: what all ranks of a launcher know this launch by. Folders made here in which nothing was
    written are removed afterwards. Raises JobError where no folder can be there, and where another
    command has it, or one above or below it, which the message names. Raises NoRoom."""
    real = _real(folder)
    if any(real.is_relative_to(held) for held in _held_here()):
        yield
        return
    with makes(folder):
        made = make_folder(folder)
    real, descriptor = _real(folder), None
    try:
        with makes(folder):
            descriptor = _lock(real, folder, launch)
        _refuse_others(real, folder)
        _wait_for_ranks(real, folder)
        token = _held.set((os.getpid(), _held_here() | {real}))
        try:
            yield
        finally:
            _held.reset(token)
    finally:
        if descriptor in _open:
            _unlock(descriptor, real / LOCK)
        remove_folders(made)


def _real(folder: Path) -> Path:
    """Return the one path of a folder that has several, also where links lead nowhere."""
    return Path(os.path.realpath(folder))


def _held_here() -> frozenset[Path]:
    process, folders = _held.get()
    return folders if process == os.getpid() else frozenset()


def _lock(real: Path, folder: Path, launch: str) -> int:
    """Return a descriptor of the folder's file that has the lock; raises JobError or OSError."""
    path, deadline = real / LOCK, time.monotonic() + LOOKS_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise JobError(f"--out {folder}: {path} is no file; valid: another --out")
            if _take(descriptor, fcntl.LOCK_EX, path):
                if _is_file(descriptor, path):  # else the one who had it has removed it
                    _write(descriptor, launch)
                    _open.add(descriptor)
                    return descriptor
            elif time.monotonic() > deadline:
                raise JobError(_in_use(folder, path))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.02)


def _take(descriptor: int, kind: int, path: Path) -> bool:
    """Take a lock and tell whether that was possible; where there are no locks, warn of it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        line = f"hybrid: warning: {path}: no lock is possible here ({error.strerror}): a second"
        print(f"{line} command in this folder would not be noticed", file=sys.stderr)
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    return False


def _write(descriptor: int, launch: str) -> None:
    """Write who this command is."""
    program = Path(sys.argv[0]).name.replace("__main__.py", "hybrid")
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([program, *sys.argv[1:]]),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "launch": launch,
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
    os.fsync(descriptor)  # so that other hosts see it


def _unlock(descriptor: int, path: Path) -> None:
    """Remove the file while it is locked, and then let go of it."""
    _open.discard(descriptor)
    with contextlib.suppress(OSError):
        if _is_file(descriptor, path):
            path.unlink()
    os.close(descriptor)


def _in_use(folder: Path, path: Path) -> str:
    holder = load_object(path)
    who = "another command"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
        who += f" ({str(holder.get('command'))[:200]})"
    whose = "is" if path.parent == _real(folder) else f"{path.parent} is"
    return f"--out {folder}: {whose} in use by {who}; valid: another --out, or wait for its end"


def _is_locked(path: Path) -> bool:
    """Tell whether another process has a lock on a file, without a trace where it has none."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def _refuse_others(real: Path, folder: Path) -> None:
    """Raise JobError where a command has a folder above this one, or one below it.

    Both commands lock their own folder before they look, so at least one of them sees the other."""
    below = [*real.glob(f"*/{LOCK}"), *real.glob(f"{PROXY}/*/{LOCK}")]
    for path in (*(above / LOCK for above in real.parents), *below):
        if _is_locked(path):
            raise JobError(_in_use(folder, path))


def refuse_held(folder: Path, launch: str | None = None) -> None:
    """Raise JobError where another command has this folder or one above it.

    launch: of this rank of a launcher, whose first rank has the folder or will take it."""
    real, deadline = _real(folder), time.monotonic() + TOLD_S
    for path in (real / LOCK, *(above / LOCK for above in real.parents)):
        if path.parent in _held_here():
            continue
        # The first rank may have the lock, and not have written yet whose it is.
        while not _is_of(path, launch) and _is_locked(path):
            if launch is None or time.monotonic() > deadline:
                raise JobError(_in_use(folder, path))
            time.sleep(0.05)


def _is_of(path: Path, launch: str | None) -> bool:
    return launch is not None and load_object(path).get("launch") == launch


def hold_log(log: Path) -> None:
    """Hold this rank's log until its process ends: the next command waits for that."""
    if _open:  # it has it already
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(log, os.O_WRONLY | _FLAGS)
        _open.add(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _wait_for_ranks(real: Path, folder: Path) -> None:
    """Wait for ranks of an earlier command, which the kernel ends with it; raises JobError."""
    deadline = time.monotonic() + ENDING_S
    for log in (path for pattern in _LOGS for path in real.glob(pattern)):
        while _is_locked(log):
            if time.monotonic() > deadline:
                raise JobError(
                    f"--out {folder}: {log.stem} of a command that has ended still runs, and writes"
                    f" {log}; valid: another --out, or wait for its end"
                )
            time.sleep(0.05)
