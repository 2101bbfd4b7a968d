"""Runs one job under several strategies, one after another, and judges each run. No torch here.

`compare` writes OUT/STRATEGY/..., OUT/compare.json, OUT/compare.md and OUT/report.html."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import records, report
from ..job.errors import JobError, RunFailed, Unsupported
from ..job.file import to_dict
from ..job.schema import Job
from ..launch.ops_cache import remove_stale_locks
from ..launch.warm import warm_ranks
from ..layout import Layout, LayoutError
from ..measure.machine import describe_machine
from ..records import Comparison, Parity, Record, ReferenceFault
from ..strategies import registry
from ..training.apart import check_apart
from ..training.check import CheckedJob, print_warnings
from ..training.progress import Watcher
from ..training.run import Program, default_nproc, launch
from .best import find_best
from .differences import Run
from .reference import describe_fault, name_suspect, settle
from .verdict import EMULATION, judge_run, rule_of

REFERENCE = "single"


def compare(
    job: Job,
    strategies: Sequence[str] = registry.NAMES,
    nproc: int | None = None,
    out: Path | str = "out/compare",
    watcher: Watcher | None = None,
    program: Program | None = None,
    fresh_ranks: bool = False,
) -> Comparison:
    """Run the job under each strategy on `nproc` processes, and compare each run with `single`.

    nproc: left out, the product of the degrees in `job.parallel`, or 2. program: the command that
    starts a rank. fresh_ranks: start each rank afresh; left out, all are forked from one process.
    Raises JobError before any process starts. A run that fails raises nothing: its record is in the
    result."""
    print_warnings(job.warnings())
    registry.check_settings(job, strategies)
    names = [REFERENCE, *(s for s in dict.fromkeys(strategies) if s != REFERENCE)]
    with warm_ranks(fresh_ranks):
        checked = check_apart(job)
        remove_stale_locks()
        layouts = _plan(checked, names, nproc or default_nproc(job))
        every = checked.job.log.model_copy(update={"every": 1})  # parity looks at every step
        job_of_runs = checked.job.model_copy(update={"log": every})
        session = _Session(job_of_runs, Path(out), watcher or Watcher(), program)
        for name, layout in layouts.items():
            session.run_planned(name, layout)
        return session.finish(job)


def _plan(checked: CheckedJob, names: Sequence[str], nproc: int) -> dict[str, Layout | str]:
    """Find the layout of each strategy, or why it cannot run here, and print the warnings."""
    layouts: dict[str, Layout | str] = {}
    warnings: list[str] = []
    for name in names:
        try:
            layouts[name], found = registry.plan(checked.job, name, nproc, checked.summary)
            warnings += [f"{name}: {line}" for line in found]
        except LayoutError as error:
            raise JobError(f"{error} (--nproc {nproc})") from None
        except Unsupported as error:
            layouts[name] = str(error)
    print_warnings(warnings)
    return layouts


class _Session:
    """Holds the runs of one comparison and the folder in which they lie."""

    def __init__(self, job: Job, out: Path, watcher: Watcher, program: Program | None) -> None:
        self.job, self.out, self.watcher, self.program = job, out, watcher, program
        self.runs: dict[str, Record] = {}
        self.controls: dict[str, Record] = {}

    def run_planned(self, name: str, layout: Layout | str) -> None:
        """Run one strategy; where it cannot run, `layout` is a text that says why."""
        if isinstance(layout, str):
            record = Record(name, "not_possible", layout)
            records.write(record, self.out / name / "record.json")
            self.watcher.finished(name, record)
        else:
            record = self._run(name, name, layout.world_size, {})
        self.runs[name] = record

    def _run(self, label: str, strategy: str, nproc: int, changes: dict[str, Any]) -> Record:
        """Launch one run in `out/label`, with these changes in its strategy's settings."""
        job, folder = _with_settings(self.job, strategy, changes), self.out / label
        try:
            return launch(job, strategy, nproc, folder, self.watcher, label, self.program)
        except RunFailed as error:
            if error.failure.kind == "job":
                raise JobError(error.failure.message) from None
            return records.read(Record, folder / "record.json")

    def finish(self, job: Job) -> Comparison:
        """Judge every run, after the control runs that this needs, and write the comparison."""
        possible = [name for name, record in self.runs.items() if record.status != "not_possible"]
        parity = {name: self._judge(name) for name in possible}
        fault = self._settle(REFERENCE) or self._settle(EMULATION)
        if fault:
            parity = {name: self._judge(name) for name in possible}
        rule = rule_of(self.job, REFERENCE, self.runs)
        parity = name_suspect(parity, REFERENCE, registry.engine, self._load, rule)
        result = Comparison(
            job=to_dict(job),
            machine=describe_machine(),
            reference=REFERENCE,
            strategies=self.runs,
            parity=parity,
            ok=all(found.ok for found in parity.values()),
            controls=self.controls,
            reference_fault=fault,
            best=find_best(self.runs, parity),
        )
        report.write(result, self.out)
        return result

    def _judge(self, name: str) -> Parity:
        while True:
            found = judge_run(self.job, name, self.runs, REFERENCE, self.controls, self._load)
            if isinstance(found, Parity):
                return found
            for control in found:
                self.controls[control.label] = self._run(
                    control.label, control.strategy, 1, control.changes
                )

    def _settle(self, label: str) -> ReferenceFault | None:
        """Put a run of a reference that repeats itself in the place of one that was off."""
        if label not in self.runs and label not in self.controls:
            return None
        rule = rule_of(self.job, label, {**self.controls, **self.runs})
        fault = settle(label, self.runs, self.controls, self.out, self._load, rule)
        if fault:
            print_warnings([describe_fault(fault)])
        return fault

    def _load(self, label: str) -> Run:
        from safetensors.numpy import load_file

        record = records.read(Record, self.out / label / "record.json")
        file = record.weights and record.weights.file
        if not file:
            raise ValueError(f"{label}: the record names no weights")
        return Run(record, load_file(self.out / label / file))


def _with_settings(job: Job, strategy: str, changes: dict[str, Any]) -> Job:
    """Return the job with these changes in one strategy's section.

    Only control runs have changes, under `single` and `local_sgd`."""
    if not changes:
        return job
    section = job.settings(strategy).model_copy(update=changes)
    strategies = job.strategy.model_copy(update={strategy: section})
    return job.model_copy(update={"strategy": strategies})
