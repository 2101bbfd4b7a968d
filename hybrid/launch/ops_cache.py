"""Where torch compiles ops at their first use: a folder for each release, without stale locks.

While a process builds an op, torch keeps a file `lock` in the op's folder, and others wait for that
to go (torch/utils/file_baton.py). A build that is killed leaves it, and every later start that
needs the op waits for ever. The builder has the file open meanwhile, which Linux shows in /proc: a
lock that no process has open is stale. No torch here.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """Where the toolkit keeps what can be made again: hybrid in XDG_CACHE_HOME or in ~/.cache. A
    relative path there is ignored (https://specifications.freedesktop.org/basedir-spec)."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "hybrid"


def package_version(name: str) -> str | None:
    """The installed release of a package; None where there is none. Imports nothing of it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


VARIABLE = "TORCH_EXTENSIONS_DIR"


def private_ops_folder() -> Path:
    """This toolkit's own. Ops built for another release crash when they are loaded, so each has a
    folder; so has each host, since /proc shows the processes of one alone."""
    releases = [f"python-{platform.python_version()}"]
    releases += [f"{name}-{package_version(name)}" for name in ("torch", "deepspeed")]
    return cache_folder() / "torch_extensions" / socket.gethostname() / "-".join(releases)


def ops_folder() -> Path:
    """The one that runs use: a user's own, where the variable is set."""
    return Path(os.environ.get(VARIABLE) or private_ops_folder())


def set_ops_folder() -> None:
    """Have this process compile ops in `ops_folder()`."""
    os.environ[VARIABLE] = str(ops_folder())


def remove_stale_locks() -> None:
    """Remove stale locks in the private folder; in a user's own folder only name them. Prints a
    line on stderr for each."""
    private = ops_folder() == private_ops_folder()
    for line in remove_private_locks() if private else describe_stale_locks(ops_folder()):
        print(f"hybrid: {line}", file=sys.stderr)


def remove_private_locks() -> list[str]:
    """Remove what locks are stale in the private folder; returns what was done."""
    root = private_ops_folder()
    if not stale_locks(root):
        return []
    # One process at a time: a lock that another has just removed may be back, with an owner.
    with FileLock(root / "mending"):
        stale = stale_locks(root)
        for lock in stale:
            lock.unlink()
    return [f"removed {lock}: the build that left it is gone" for lock in stale]


def describe_stale_locks(root: Path) -> list[str]:
    """What to tell of stale locks in a folder that is not ours to clean: on a file system of
    several hosts the owner may live elsewhere."""
    return [
        f"warning: {lock}: no process on this host is building there, and what needs this op waits "
        "for the file to go; remove it, unless another host is"
        for lock in stale_locks(root)
    ]


def stale_locks(root: Path) -> list[Path]:
    """Locks of this user under `root` that no process has open. None where that cannot be told:
    without /proc."""
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    found = {lock: status for lock in locks if (status := _status(lock))}
    mine = {lock: _file(s) for lock, s in found.items() if s.st_uid == os.getuid()}
    held = _open_files()
    return [lock for lock, file in mine.items() if file not in held]


def _open_files() -> set[tuple[int, int]]:
    """All that this user's processes have open. Not by name: in a container it has other ones."""
    links = (link for process in Path("/proc").glob("[0-9]*") for link in _links(process))
    return {_file(status) for link in links if (status := _status(link))}


def _links(process: Path) -> Sequence[Path]:
    try:
        return list((process / "fd").iterdir())
    except OSError:  # it has ended, or is another user's
        return []


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _file(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
