"""This module chooses the folder where torch compiles ops at first use, and removes stale locks.

While a process builds an op, torch keeps a file `lock` in the op's folder, and other processes wait
until it is gone (torch/utils/file_baton.py). A build that is killed leaves it, and every later
start that needs the op waits for ever. The builder has the file open meanwhile, which Linux shows
in /proc: a lock that no process has open is stale. The module needs no torch."""

import glob
import os
import platform
import socket
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock

from ..job.errors import JobError

VARIABLE = "TORCH_EXTENSIONS_DIR"


def cache_folder() -> Path:
    """Return the folder for what can be made again: hybrid in XDG_CACHE_HOME or in ~/.cache.

    A relative XDG_CACHE_HOME is ignored (https://specifications.freedesktop.org/basedir-spec)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "hybrid"
    except RuntimeError:  # a container may run under a number that no user has
        words = "is not set, and this user has no home; valid: a folder for what can be made again"
        raise JobError(f"XDG_CACHE_HOME: {words}") from None


def package_version(name: str) -> str | None:
    """Return a package's installed release without importing it, or None if there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def private_ops_folder() -> Path:
    """Return this toolkit's own folder of ops, one for each release and host.

    Ops built for another release crash when they are loaded. /proc shows the processes of one host
    alone."""
    releases = [f"python-{platform.python_version()}"]
    releases += [f"{name}-{package_version(name)}" for name in ("torch", "deepspeed")]
    return cache_folder() / "torch_extensions" / socket.gethostname() / "-".join(releases)


def ops_folder() -> Path:
    """Return the folder that runs use: the user's own, where the variable is set."""
    return Path(os.environ.get(VARIABLE) or private_ops_folder())


def set_ops_folder() -> None:
    """Have this process compile ops in `ops_folder()`."""
    os.environ[VARIABLE] = str(ops_folder())


def remove_stale_locks() -> None:
    """Remove stale locks in the private folder, or name those in a user's own folder, on stderr."""
    private = ops_folder() == private_ops_folder()
    for line in remove_private_locks() if private else _describe_stale_locks(ops_folder()):
        print(f"hybrid: {line}", file=sys.stderr)


def remove_private_locks() -> list[str]:
    """Remove stale locks in the private folder, and return a line for each."""
    root = private_ops_folder()
    if not stale_locks(root):
        return []
    # One process at a time: a lock that another has just removed may be back, with an owner.
    with FileLock(root / "mending"):
        stale = stale_locks(root)
        for lock in stale:
            lock.unlink()
    return [f"removed {lock}: the build that left it is gone" for lock in stale]


def _describe_stale_locks(root: Path) -> list[str]:
    """Return a warning for each stale lock in a user's own folder.

    They stay, since the owner may run on another host that shares the file system."""
    return [
        f"warning: {lock}: no process on this host is building there, and what needs this op waits "
        "for the file to go; remove it, unless another host is"
        for lock in stale_locks(root)
    ]


def stale_locks(root: Path) -> list[Path]:
    """Return this user's locks under `root` that no process has open; none without /proc."""
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    mine = [(lock, status) for lock, status in _stat(locks) if status.st_uid == os.getuid()]
    # glob skips processes that have ended or are another user's. Names are not compared, since a
    # process in a container has other names for the same files.
    held = [status for _, status in _stat(map(Path, glob.iglob("/proc/[0-9]*/fd/*")))]
    return [lock for lock, s in mine if not any(os.path.samestat(s, open_) for open_ in held)]


def _stat(paths: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield each path that exists with its status."""
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        yield path, status
