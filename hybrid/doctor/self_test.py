"""Trains a tiny job under each strategy on a few processes, and compares the runs.

This shows what really works here, where the other checks only look at files and settings. It takes
some seconds for each strategy, so `--no-self-test` leaves it out."""

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..comparison.session import compare
from ..job.errors import Failure, JobError, RunFailed, Unsupported
from ..job.file import load_job
from ..job.schema import Job
from ..launch.warm import warm_ranks
from ..records import Comparison, Record
from ..records.whole import working_folder
from ..strategies import registry
from ..training.progress import Watcher
from .finding import Finding, count
from .machine import torch_problem

STRATEGY_S = 90.0  # a run that has not ended by then hangs: it takes ten on two slow cores
TINY = {
    "model": {"name": "mlp", "options": {"sizes": [8, 8, 8]}},
    "data": {"name": "random", "options": {"samples": 16, "features": 8, "classes": 8}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 8, "micro_batches": 2, "steps": 2},
    "strategy": {"local_sgd": {"sync_every": 1}},
}


class Patience(Watcher):
    """Tells on stderr which runs have ended, and fails a run that hangs."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.seconds: dict[str, float] = {}

    def started(self, name: str, steps: int, out: Path) -> None:
        self.begun = time.monotonic()

    def poll(self) -> None:
        if time.monotonic() - self.begun > STRATEGY_S:
            raise RunFailed(Failure(0, f"had not ended after {STRATEGY_S:.0f} s", ""))

    def finished(self, name: str, record: Record) -> None:
        self.seconds[name] = time.monotonic() - self.begun if record.world_size else 0.0
        words = f"{record.status.replace('_', ' ')} after {self.seconds[name]:.0f} s"
        print(f"hybrid: self-test: {name} {words}", file=sys.stderr, flush=True)


def check_strategies(names: Sequence[str] = registry.NAMES) -> Iterator[Finding]:
    """Check each strategy, with one comparison of all that take the same number of processes."""
    if torch_problem():
        yield Finding("self-test", "warning", "not run: torch does not work", "see torch above")
        return
    job, watcher = load_job(TINY), Patience()
    try:
        own = Path(tempfile.gettempdir(), "hybrid-self-test")
        with warm_ranks(), working_folder(own, 0o700) as folder:
            for nproc, some in itertools.groupby(names, lambda name: num_processes(job, name)):
                chosen = list(some)
                result = compare(job, chosen, nproc, folder / str(nproc), watcher)
                for name in chosen:
                    yield describe_run(name, result, watcher.seconds[name])
    except (JobError, ModuleNotFoundError, OSError) as error:
        yield Finding("self-test", "error", f"could not be run: {error}", "see the packages above")


def num_processes(job: Job, name: str) -> int:
    """Return two, or four where a strategy cannot do with two."""
    try:
        registry.get(name).layout(job, 2)
    except Unsupported:
        return 4
    return 2


def describe_run(name: str, result: Comparison, seconds: float) -> Finding:
    """Say what a comparison found out about one strategy, whose run took so many seconds."""
    record, title = result.strategies[name], f"runs {name}"
    reference = result.strategies[result.reference]
    if record.status == "not_possible":
        return Finding(title, "warning", f"not possible here: {record.reason}")
    if record.status != "ok":
        mend = "what is missing is named there, or among the findings above"
        return Finding(title, "error", f"failed: {record.reason}", mend)
    if reference.status != "ok":
        return Finding(title, "error", f"the reference failed: {reference.reason}")
    if not result.parity[name].ok:
        first = result.parity[name].first_difference
        return Finding(title, "error", f"does not compute what {result.reference} does: {first}")
    processes = count(record.world_size, "process")
    return Finding(title, "ok", f"in {seconds:.0f} s, on {processes}, as {result.reference} does")
