"""Plays a rank on a host of its own: `python -m tests.played_host HOSTS_FOLDER CODES hybrid-words`.

Ranks 2 and 3 leave this process's mount and UTS namespaces: what others write in HOSTS_FOLDER they
do not see, and their host has another name. `{job}` in the words is a file of each host's own. The
exit status goes to CODES/rankN, with the files that the host has, so that every rank is heard."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUTS = 0x00020000, 0x04000000
MS_REC, MS_PRIVATE = 16384, 1 << 18
SECOND = "second-host"


def go_apart(folder: str) -> None:
    """Have this process see an empty folder in the place of the others', on a host of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.unshare(CLONE_NEWNS | CLONE_NEWUTS)
    done = done or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    done = done or libc.mount(b"none", folder.encode(), b"tmpfs", 0, b"size=8m")
    if done:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname(SECOND)


def can_go_apart() -> bool:
    """Tell whether this machine lets a process have namespaces of its own."""
    if (child := os.fork()) == 0:
        try:
            go_apart("/tmp")
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    from hybrid.cli import main as run
    from hybrid.launch import farewell

    farewell.leave = sys.exit  # type: ignore[assignment]  # a failed rank leaves without an error

    folder, codes, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
    host = "2" if rank >= 2 else "1"
    if host == "2":
        go_apart(folder)
        os.environ["LOCAL_RANK"] = str(rank - 2)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    job = str(codes / f"job{host}.json")
    sys.argv = ["hybrid", *(job if word == "{job}" else word for word in sys.argv[3:])]
    status: object = 1
    try:
        run()
    except SystemExit as end:
        status = end.code
    seen = sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())
    (codes / f"rank{rank}").write_text("\n".join([str(status), *seen]))
    os._exit(0)


if __name__ == "__main__":
    main()
