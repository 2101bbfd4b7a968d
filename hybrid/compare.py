"""One job under several strategies: a launcher each, then the verdict. Holds no torch of its own.

`compare` writes OUT/STRATEGY/..., OUT/compare.json, OUT/compare.md and OUT/report.html.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from . import environment, jit_cache, launch, records, report
from .config import Job, JobError
from .job_file import to_dict
from .layout import Layout, LayoutError
from .parity import Run, judge
from .records import Comparison, Parity, Record
from .strategies import registry
from .strategies.base import Unsupported
from .tolerances import EXACT_STEPS, tolerance

REFERENCE = "single"
EMULATION = "local_sgd_emulation"
CONTROL_CUTS = (1, 3, 7)  # micro-batches of the control runs: other orders of the same sums
Program = Sequence[str]
PROGRAM: Program = (sys.executable, "-m", "hybrid")


class Watcher(Protocol):
    """Is told what a comparison does, to show it."""

    def started(self, name: str, steps: int, out: Path) -> None:
        """A run begins; its `steps.jsonl` grows in `out`."""
        ...

    def poll(self) -> None:
        """Called often while a run lasts."""
        ...

    def finished(self, name: str, record: Record) -> None:
        """A run has ended."""
        ...


class Silent:
    """A watcher that shows nothing."""

    def started(self, name: str, steps: int, out: Path) -> None:
        """Nothing."""

    def poll(self) -> None:
        """Nothing."""

    def finished(self, name: str, record: Record) -> None:
        """Nothing."""


def compare(
    job: Job,
    strategies: Sequence[str] = registry.NAMES,
    nproc: int | None = None,
    out: Path | str = "out/compare",
    watcher: Watcher | None = None,
    program: Program = PROGRAM,
) -> Comparison:
    """Run the job under each strategy on `nproc` processes and hold each run against `single`.

    nproc: left out, what `job.parallel` multiplies to, or 2. `program` is what starts a rank.
    Raises JobError before any process starts; a run that fails is in the result, not raised.
    """
    from .prepare import prepare

    prepared = prepare(job)
    jit_cache.mend()
    nproc = nproc or default_nproc(job)
    session = _Session(prepared.job, Path(out), watcher or Silent(), program)
    names = [REFERENCE, *(s for s in dict.fromkeys(strategies) if s != REFERENCE)]
    layouts: dict[str, Layout | str] = {}
    for name in names:
        try:
            layouts[name], warnings = registry.plan(prepared.job, name, nproc, prepared.outline)
            for line in warnings:
                print(f"hybrid: warning: {name}: {line}", file=sys.stderr)
        except LayoutError as error:
            raise JobError(f"{error} (--nproc {nproc})") from None
        except Unsupported as error:
            layouts[name] = str(error)
    runs = {name: session.run_planned(name, layout) for name, layout in layouts.items()}
    return session.verdict(job, runs)


def default_nproc(job: Job) -> int:
    """Processes that the job's own degrees ask for; 2 where it names none."""
    p = job.parallel
    return (p.pp or 1) * (p.dp or 1) if p.pp or p.dp else (p.replicate or 1) * (p.shard or 2)


class _Session:
    """The runs of one comparison and the folder they lie in."""

    def __init__(self, job: Job, out: Path, watcher: Watcher, program: Program) -> None:
        self.job, self.out, self.watcher, self.program = job, out, watcher, program
        self.controls: dict[str, Record] = {}

    def run_planned(self, name: str, layout: Layout | str) -> Record:
        """The record of one strategy; `layout` is text where it cannot run, and why."""
        if isinstance(layout, str):
            record = Record(name, "not_possible", layout)
            self.watcher.finished(name, record)
            return record
        return self.run(name, name, layout.world_size, {})

    def run(self, label: str, strategy: str, nproc: int, changes: dict[str, Any]) -> Record:
        """Launch one run, in `out/label`, with changed settings of its strategy."""
        folder = self.out / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "record.json").unlink(missing_ok=True)
        job = _with_settings(self.job, strategy, changes)
        records.write(to_dict(job), folder / "job.json")
        arguments = ["train", str(folder / "job.json"), "--strategy", strategy]
        self.watcher.started(label, job.train.steps or 0, folder)
        try:
            launch.run(
                nproc,
                [*arguments, "--out", str(folder)],
                folder,
                self.watcher.poll,
                self.program,
            )
            record = records.read(Record, folder / "record.json")
        except launch.RunFailed as error:
            failure = error.failure
            if failure.kind == "job":
                raise JobError(failure.message) from None
            record = Record(strategy, "failed", str(error), world_size=nproc)
            if failure.kind == "unsupported":  # which could not be known before there was a model
                record = Record(strategy, "not_possible", failure.message, world_size=nproc)
        self.watcher.finished(label, record)
        return record

    def verdict(self, job: Job, runs: dict[str, Record]) -> Comparison:
        """Judge every run, running controls where the strict tolerance is passed, and write."""
        parity = {
            name: self._judge(name, record) for name, record in runs.items() if name != REFERENCE
        }
        reference = runs[REFERENCE]
        parity[REFERENCE] = Parity(
            reference.status == "ok", 0.0, 0.0, tolerance(job.train.precision)
        )
        possible = [name for name, record in runs.items() if record.status != "not_possible"]
        result = Comparison(
            job=to_dict(job),
            machine=environment.describe(),
            reference=REFERENCE,
            strategies=runs,
            parity={name: parity[name] for name in possible},
            ok=all(parity[name].ok for name in possible),
            controls=self.controls,
        )
        report.write(result, self.out)
        return result

    def _judge(self, name: str, record: Record) -> Parity:
        allowed = _tolerance(self.job, name)
        if record.status != "ok":
            return Parity(False, None, None, allowed)
        against = self._reference_of(name, record)
        if against is None:
            return Parity(False, None, None, allowed)
        factors = {
            "micro-batches": self.job.micro_batches(name),
            "data-parallel ranks": record.layout["dp"],
        }
        run, reference = self._load(name), self._load(against)
        exact = EXACT_STEPS[self.job.train.precision]
        strict = judge(run, reference, against, allowed, factors, (), exact)
        late = strict.first_difference
        if late is None or (late.step is not None and late.step < exact):
            return strict
        controls = [self._load(label) for label in self._controls(against, record)]
        return judge(run, reference, against, allowed, factors, controls, exact)

    def _reference_of(self, name: str, record: Record) -> str | None:
        """What a run is held against: `single`, or for local SGD its emulation in one process, made
        now. None where that run failed."""
        if name != "local_sgd":
            ok = (self.out / REFERENCE / "record.json").exists()
            return REFERENCE if ok else None
        replicas = {"emulate_replicas": record.layout["dp"]}
        self.controls[EMULATION] = self.run(EMULATION, name, 1, replicas)
        return EMULATION if self.controls[EMULATION].status == "ok" else None

    def _controls(self, against: str, record: Record) -> list[str]:
        """Labels of the control runs of a reference, made when first asked for."""
        strategy, changes = REFERENCE, {}
        if against == EMULATION:
            strategy, changes = "local_sgd", {"emulate_replicas": record.layout["dp"]}
        labels = []
        for cut in CONTROL_CUTS:
            label = f"{against}_cut_{cut}"
            if label not in self.controls:
                settings = changes | {"micro_batches": cut}
                self.controls[label] = self.run(label, strategy, 1, settings)
            if self.controls[label].status == "ok":
                labels.append(label)
        return labels

    def _load(self, label: str) -> Run:
        from safetensors.numpy import load_file

        record = records.read(Record, self.out / label / "record.json")
        file = record.weights and record.weights.file
        if not file:
            raise ValueError(f"{label}: the record names no weights")
        return Run(record, load_file(self.out / label / file))


def _tolerance(job: Job, name: str) -> dict[str, float]:
    """What a run may differ by: wider where layers compute in fewer bits, or a communication hook
    rounds gradients on their way."""
    hook = job.strategy.ddp.comm_hook if name == "ddp" else "none"
    return tolerance(job.train.precision, hook)


def _with_settings(job: Job, strategy: str, changes: dict[str, Any]) -> Job:
    """The job with other settings in one strategy's section; one's own strategy has none."""
    if not changes:
        return job
    field = "two_d" if strategy == "2d" else strategy
    section = getattr(job.strategy, field).model_copy(update=changes)
    strategies = job.strategy.model_copy(update={field: section})
    return job.model_copy(update={"strategy": strategies})
