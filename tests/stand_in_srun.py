"""Stands for srun where there is none: `python -m tests.stand_in_srun -n N PYTHON -m MODULE ...`.

It imports what the ranks need once and forks them, each with the variables that srun sets; like
`srun -K1` it ends the others when one fails, and hands on SIGTERM."""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import sys
from types import FrameType

RANKS: dict[int, int] = {}  # the process of each rank that runs


def become_rank(rank: int, count: int, words: list[str]) -> None:
    """Run `PYTHON -m MODULE ...` as one rank, and end."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    here = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_NTASKS": count}
    step = {"SLURM_STEP_NUM_TASKS": count, "SLURM_STEP_TASKS_PER_NODE": count}
    where = {"SLURM_JOB_ID": os.getppid(), "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_NODES": 1}
    os.environ.update({key: str(value) for key, value in (here | step | where).items()})
    assert words[1] == "-m"
    sys.argv = words[2:]
    status = 1
    try:
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_all(number: int = 0, frame: FrameType | None = None) -> None:
    for process in RANKS.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)


def main() -> int:
    count = int(sys.argv[sys.argv.index("-n") + 1])
    words = sys.argv[sys.argv.index("-n") + 2 :]
    importlib.import_module("hybrid.training.loop")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for rank in range(count):
        if (process := os.fork()) == 0:
            become_rank(rank, count, words)
        RANKS[rank] = process
    signal.signal(signal.SIGTERM, end_all)
    first = 0
    while RANKS:
        process, status = os.wait()
        rank = next(rank for rank, one in RANKS.items() if one == process)
        del RANKS[rank]
        code = os.waitstatus_to_exitcode(status)
        if code and not first:
            first = code if code > 0 else 128 - code
            end_all()
    return first


if __name__ == "__main__":
    sys.exit(main())
