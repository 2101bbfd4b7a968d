"""A tiny job under each strategy, on a few processes, by `hybrid.compare`: what really runs here.

It takes some seconds a strategy, most of them imports. What it costs is why it can be left out;
that everything else here only looks at files and settings is why it is run unless it is.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..compare import Silent, compare
from ..config import Job, JobError
from ..job_file import load_job
from ..launch import Failure, RunFailed
from ..records import Comparison, Record
from ..strategies import registry
from ..strategies.base import Unsupported
from .devices import torch_problem
from .finding import Finding

STRATEGY_S = 90.0  # a run that has not ended by then hangs: it takes ten on two slow cores
TINY = {
    "model": {"name": "mlp", "options": {"sizes": [8, 8, 8]}},
    "data": {"name": "random", "options": {"samples": 16, "features": 8, "classes": 8}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 8, "micro_batches": 2, "steps": 2},
    "strategy": {"local_sgd": {"sync_every": 1}},
}


class Patience(Silent):
    """Says on stderr which runs have ended, and ends one that hangs: what it raises, `compare`
    takes for the run's own failure."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.seconds: dict[str, float] = {}

    def started(self, name: str, steps: int, out: Path) -> None:
        """The clock starts anew."""
        self.begun = time.monotonic()

    def poll(self) -> None:
        """Raises RunFailed once the time is up."""
        if time.monotonic() - self.begun > STRATEGY_S:
            raise RunFailed(Failure(0, f"had not ended after {STRATEGY_S:.0f} s", ""))

    def finished(self, name: str, record: Record) -> None:
        """Keeps the time it took."""
        self.seconds[name] = time.monotonic() - self.begun if record.world_size else 0.0
        words = f"{record.status.replace('_', ' ')} after {self.seconds[name]:.0f} s"
        print(f"hybrid: self-test: {name} {words}", file=sys.stderr, flush=True)


def check_strategies(names: Sequence[str] = registry.NAMES) -> Iterator[Finding]:
    """A finding for each strategy, from one comparison of all that take as many processes."""
    if torch_problem():
        yield Finding("self-test", "warning", "not run: torch does not work", "see torch above")
        return
    job, watcher = load_job(TINY), Patience()
    try:
        with tempfile.TemporaryDirectory(prefix="hybrid-doctor-") as folder:
            for nproc, some in itertools.groupby(names, lambda name: num_processes(job, name)):
                chosen = list(some)
                result = compare(job, chosen, nproc, Path(folder) / str(nproc), watcher)
                for name in chosen:
                    yield judge(name, result, watcher.seconds[name])
    except (JobError, ModuleNotFoundError, OSError) as error:
        yield Finding("self-test", "error", f"could not be run: {error}", "see the packages above")


def num_processes(job: Job, name: str) -> int:
    """Two, or four where a strategy cannot do with two."""
    try:
        registry.get(name).layout(job, 2)
    except Unsupported:
        return 4
    return 2


def judge(name: str, result: Comparison, seconds: float) -> Finding:
    """What a comparison of one strategy says about it; it took so many seconds."""
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
    count = f"{record.world_size} process{'es' if record.world_size > 1 else ''}"
    return Finding(title, "ok", f"in {seconds:.0f} s, on {count}, as {result.reference} does")
