"""One rank that trains several jobs, each in a process forked after everything is imported:
`_families_worker.py STRATEGY OUT PORT:JOB ...`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401 - imported before the forks, which then start at once
import deepspeed  # noqa: F401
import transformers  # noqa: F401

import hybrid
from hybrid.launch.orphans import end_with_launcher


def train_one(strategy: str, out: Path, port: str, file: str) -> int:
    """The exit status of one job's rank."""
    os.environ["MASTER_PORT"] = port
    try:
        hybrid.train(hybrid.load_job(file), strategy, out / Path(file).stem)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """All jobs, one after another; the first that fails ends it."""
    end_with_launcher()
    strategy, out, *jobs = sys.argv[1:]
    for job in jobs:
        port, _, file = job.partition(":")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            status = train_one(strategy, Path(out), port, file)
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            sys.exit(1)


if __name__ == "__main__":
    main()
