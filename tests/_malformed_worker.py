"""Runs command lines one after another, each in a process of its own, and says what each cost.

Reads a JSON list of {"words": [...], "environ": {...}} and writes one of {"status", "stdout",
"stderr", "cpu_s", "heavy"}. What a command imports is imported once, here, and every process is
forked from this one; `cpu_s` counts from the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from typing import IO, Any

from hybrid import data, models, records
from hybrid.cli import main
from hybrid.doctor import files
from hybrid.job import file
from hybrid.strategies import registry
from hybrid.training import run as training_run

USED = (data, file, files, models, records, training_run)  # by the command line, late

HEAVY = ("torch", "accelerate", "deepspeed", "transformers", "numpy")
HANGS_S = 20


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One command line; a status of -SIGALRM where it hangs."""
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        pid = os.fork()
        if pid == 0:
            _be_the_command(case, streams)
        _, status, usage = os.wait4(pid, 0)
        for stream in streams:
            stream.seek(0)
        stdout, stderr, heavy = (stream.read().decode() for stream in streams)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "stdout": stdout,
        "stderr": stderr,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "heavy": heavy.split(),
    }


def _be_the_command(case: dict[str, Any], streams: list[IO[bytes]]) -> None:
    signal.alarm(HANGS_S)
    os.dup2(streams[0].fileno(), 1)
    os.dup2(streams[1].fileno(), 2)
    os.environ.update(case["environ"])
    sys.argv = ["hybrid", *case["words"]]
    try:
        main()
    except SystemExit as leave:
        status = int(leave.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    streams[2].write(" ".join(m for m in HEAVY if m in sys.modules).encode())
    for stream in (sys.stdout, sys.stderr, streams[2]):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    for name in registry.NAMES:
        registry.get(name)
    print(json.dumps([run(case) for case in json.load(sys.stdin)]))
