"""hybrid's whole loop, `hybrid.train`, as it runs in each rank of a run with a folder.

It loads the data, keeps the status file, writes `steps.jsonl` and shows progress, as always.
"""

import tempfile
from pathlib import Path
from typing import Any

import hybrid
from hybrid.training.progress import Progress

from .driven import Driven, OnStep
from .workloads import LOG_EVERY, TOTAL_STEPS, Workload


def make(workload: Workload, reads: bool = False) -> Driven:
    """Return the loop, some steps at a time.

    reads: it reads its numbers in every step, which is the default of `log.every`. Otherwise it
    calls back for several steps at once, so that only blocks of as many say what a step costs."""

    def loop(on_step: OnStep) -> None:
        folder = Path(tempfile.mkdtemp(prefix="overhead-"))
        watcher = None
        if workload.rank == 0:
            watcher = Progress(shared=True)
            watcher.started(workload.strategy, TOTAL_STEPS, folder)

        def note(record: Any, total: int) -> None:
            if watcher:
                watcher.follow(record, total)
            on_step(record.loss)

        job = hybrid.load_job(workload.job(log_every=1 if reads else LOG_EVERY))
        hybrid.train(job, workload.strategy, folder, note)

    return Driven(loop)
