"""Trains a tiny job under each strategy on a few processes, and compares the runs.

This shows what really works here, where the other checks only look at files and settings. It takes
some seconds for each strategy, so `--no-self-test` leaves it out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..comparison.session import compare
from ..job.errors import Failure, JobError, RunFailed, Unsupported
from ..job.file import load_job
from ..job.schema import Job
from ..launch.by_launcher import Launcher
from ..launch.devices import count_gpus, device_for
from ..launch.warm import warm_ranks
from ..records import Comparison, Record
from ..records.whole import working_folder
from ..strategies import registry
from ..training.progress import Watcher
from .evidence import Tested
from .finding import Finding, count
from .machine import torch_problem

if TYPE_CHECKING:
    from .relay import Relay

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


def check_strategies(
    names: Sequence[str] = registry.NAMES,
    tested: list[Tested] | None = None,
    relay: Relay | None = None,
    world_size: int = 0,
) -> Iterator[Finding]:
    """Check each strategy, with one comparison of all that take the same number of processes.

    tested: takes what each comparison found. relay: starts the ranks, `world_size` of them, where a
    launcher has put this process and its peers."""
    if torch_problem():
        yield Finding("self-test", "warning", "not run: torch does not work", "see torch above")
        return
    watcher, tested = Patience(), [] if tested is None else tested
    own = Path(tempfile.gettempdir(), "hybrid-self-test")
    groups = [Group(world_size, "auto", list(names))] if relay else list_groups(names)
    starter = Launcher(relay.template) if relay else None
    try:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(working_folder(own, 0o700))
            stack.enter_context(relay.serving(folder) if relay else warm_ranks())
            for number, group in enumerate(groups):
                job, rest = tiny_job(group), (folder / str(number), watcher, starter)
                result = compare(job, group.names, group.nproc, *rest)
                for name in group.names:
                    seconds = watcher.seconds[name]
                    tested.append(describe_test(name, result, seconds, group))
                    yield describe_run(name, result, seconds, group.note)
    except (JobError, ModuleNotFoundError, OSError) as error:
        yield Finding("self-test", "error", f"could not be run: {error}", "see the packages above")


@dataclasses.dataclass(frozen=True)
class Group:
    """Holds strategies that are compared together, on so many processes; `note` says on what."""

    nproc: int
    device: str
    names: list[str]
    note: str = ""


def list_groups(names: Sequence[str]) -> list[Group]:
    """Return what to compare on this host alone, with 0, 1, 2 or more GPUs.

    Where there are fewer GPUs than processes, these run on the CPU. A single GPU then also runs, in
    one process, each strategy that can do with one."""
    found, gpus = [], count_gpus()
    for nproc, some in itertools.groupby(names, num_processes):
        device = device_for(nproc)
        note = f", on the CPU: {count(gpus, 'GPU')} here" if device == "cpu" else ""
        found.append(Group(nproc, device, list(some), note))
    alone = [name for name in names if _can_be_alone(name)]
    if gpus == 1 and alone:
        found.append(Group(1, "cuda", alone, ", on the GPU"))
    return found


def tiny_job(group: Group) -> Job:
    """Return the job, with a layer for each stage and samples for each rank of many."""
    ranks = max(2, group.nproc)
    sizes = {"model.options": {"sizes": [8] * (ranks + 1)}, "train.global_batch": 4 * ranks}
    rest = {"data.options.samples": 8 * ranks, "launch.device": group.device}
    return load_job(TINY, sizes | rest)


def _can_be_alone(name: str) -> bool:
    with contextlib.suppress(Unsupported):
        return registry.get(name).layout(load_job(TINY), 1).world_size == 1
    return False


def num_processes(name: str) -> int:
    """Return two, or four where a strategy cannot do with two."""
    try:
        registry.get(name).layout(load_job(TINY), 2)
    except Unsupported:
        return 4
    return 2


def describe_test(name: str, result: Comparison, seconds: float, group: Group) -> Tested:
    """Return what a comparison found out about one strategy, as an evidence file has it."""
    record, parity = result.strategies[name], result.parity.get(name)
    status: str = record.status
    if status == "ok":
        status = "equal" if parity is None or parity.ok else "not_equal"
    differences = [getattr(parity, f"max_{what}_diff", None) for what in ("loss", "weight")]
    numbers = [n if n is not None and math.isfinite(n) else None for n in differences]
    reason = record.reason
    if status == "not_equal" and parity:
        reason = str(parity.first_difference)
    device = "cpu" if group.device == "cpu" or not count_gpus() else "cuda"
    shown = None if reason is None else reason.replace(tempfile.gettempdir(), "TMP")
    return Tested(name, status, record.world_size, device, round(seconds, 1), shown, *numbers)  # type: ignore[arg-type]


def describe_run(name: str, result: Comparison, seconds: float, note: str = "") -> Finding:
    """Say what a comparison found out about one strategy, whose run took so many seconds."""
    record, title = result.strategies[name], f"runs {name}{note}"
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
