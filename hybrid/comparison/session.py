"""Runs one job under several strategies, one after another, and judges each run. No torch here.

`compare` writes OUT/STRATEGY/..., OUT/compare.json, OUT/compare.md and OUT/report.html, and
OUT/session.json, by which an interrupted comparison is resumed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import records, report
from ..job.errors import needs_room
from ..job.file import make_proxy, to_dict
from ..job.given import naming
from ..job.outputs import read_folder
from ..job.schema import Checkpoint, Job
from ..job.variants import resolve, warnings_of, with_settings
from ..launch.by_launcher import Launcher, choose_launcher
from ..launch.devices import gpus_hidden
from ..launch.fork_here import why_not
from ..launch.ops_cache import remove_stale_locks
from ..launch.warm import warm_ranks
from ..layout import Layout
from ..measure.machine import describe_machine
from ..records import INTERRUPTED, PROXY, Comparison, Parity, Record, ReferenceFault
from ..records.steps import read_run, shorten
from ..strategies import registry
from ..training.apart import check_apart
from ..training.check import print_warnings
from ..training.early import check_early
from ..training.progress import Watcher
from ..training.run import Starter, modules_of
from .best import find_best
from .controls import Control
from .differences import Run, SavedWeights
from .doubts import name_suspect, settle
from .interruption import Interruption, make_interruption
from .planning import plan_runs, plan_second
from .previous import claim, remove_previous
from .proxied import explain_unproved, judge_by_proxy
from .references import Selection, find_reference, find_too_large, select
from .resume import begin_session, check_session, describe_session
from .runs import Runs
from .tolerances import tolerance
from .verdict import EMULATION, judge_run, rule_of


def compare(
    job: Job,
    strategies: Sequence[str] | None = None,
    nproc: int | None = None,
    out: Path | str = "out/compare",
    watcher: Watcher | None = None,
    program: Starter | None = None,
    fresh_ranks: bool = False,
    reference: str | None = None,
    resume: bool = False,
    model: Callable[..., Any] | None = None,
    data: Callable[..., Any] | None = None,
    interrupt: int | None = None,
    resume_as: str | None = None,
    launcher: str | None = None,
) -> Comparison:
    """Run the job under each strategy on `nproc` processes, and compare each run with `reference`.

    strategies: names of strategies and variants; left out, all. nproc: left out, the product of the
    degrees in `job.parallel` or in a variant, or 2. program: what starts a rank. fresh_ranks: none
    is a fork of one warm process. launcher: a command with `{nproc}` that starts them. reference:
    left out, `single`, or what can stand in. resume: keep the runs in `out`, where stopped ones go
    on. model, data: functions in the job's place (`job.given`). interrupt, resume_as: see
    `Interruption`. Raises JobError before any process starts, and NoRoom. A proxy comes first."""
    program = choose_launcher(launcher, "compare") or program
    if model is not None or data is not None:
        with naming(job, model, data, why_not(fresh_ranks or program is not None)) as named:
            rest = watcher, program, fresh_ranks, reference, resume, None, None, interrupt
            return compare(named, strategies, nproc, out, *rest, resume_as)
    out, stop, small = read_folder(out), make_interruption(interrupt, resume_as), make_proxy(job)
    selection = select(job, strategies, reference)
    nproc = _check_names(job, [*selection.names, resume_as], nproc, isinstance(program, Launcher))
    held = dataclasses.replace(selection, fixed=bool(stop) or selection.fixed)
    hidden, warm = gpus_hidden(job.launch.device), warm_ranks(fresh_ranks)
    with claim(out, selection.names, resume) as mark, needs_room(out), hidden, warm:
        options = nproc, watcher or Watcher(), program, resume, stop, mark
        prover = _Session(small, held, out / PROXY, *options, "proxy/") if small else None
        session = _Session(job, selection.by_proxy() if small else held, out, *options)
        remove_stale_locks()
        return session.run(prover)


def _check_names(job: Job, runs: Sequence[str | None], nproc: int | None, by_others: bool) -> int:
    """Check the settings of strategies and variants, and return the number of processes.

    by_others: a launcher starts them."""
    names = [*dict.fromkeys(name for name in runs if name is not None)]
    print_warnings(warnings_of(job, names))
    registry.check_settings(job, names)
    return check_early(job, names, nproc, here=not by_others)


class _Session:
    """Holds the runs of one comparison and the folder in which they lie."""

    def __init__(
        self,
        job: Job,
        selection: Selection,
        out: Path,
        nproc: int,
        watcher: Watcher,
        program: Starter | None,
        resume: bool,
        stop: Interruption | None,
        mark: str | None,
        title: str = "",
    ) -> None:
        """Check the job and what the folder holds; raises JobError, and changes nothing there.

        stop: where each run but the reference is interrupted. mark: the comparison's `id`. title:
        what stands before the runs' names where they are shown."""
        modules = modules_of(resolve(job, selection.names[0]), program)
        self.checked = checked = check_apart(job, modules).require()
        every = checked.job.log.model_copy(update={"every": 1})  # parity looks at every step
        self.asked, self.job = job, checked.job.model_copy(update={"log": every})
        self.selection, self.reference = selection, selection.reference
        self.layers = checked.summary.batch_norms  # whose result depends on how a batch is cut
        self.layouts = plan_runs(checked, selection.names, nproc, title)
        self.stop, self.second = stop, dict[str, Layout | str]()
        if stop:
            second = plan_second(checked, stop, self.layouts, self.reference, nproc, title)
            self.second = second.layouts
            self.layouts = {**self.layouts, **second.refused}
        self.out, self.watcher, self.title, self.resume = out, watcher, title, resume
        self.description = describe_session(job, nproc, mark) | (stop.describe() if stop else {})
        if resume:
            check_session(out, self.description)
        self.made = Runs(checked, out, watcher, program, resume, title, self.description)
        self.runs: dict[str, Record] = {}
        self.controls: dict[str, Record] = {}
        self.proved: Comparison | None = None
        self.has_proxy = self.interrupted = False

    def run(self, prover: "_Session | None" = None) -> Comparison:
        """Run what is asked for and judge it; `prover` compares the small job before.

        Where the user interrupts this, what there is so far is judged and written."""
        begin_session(self.out, self.description, self.resume)
        self.has_proxy = prover is not None
        try:
            self.proved = prover.run() if prover else None
            for name, layout in self.layouts.items():
                self.run_planned(name, layout)
            return self.finish()
        except (KeyboardInterrupt, SystemExit):
            self.interrupted = True
            self._name_the_rest()
            self.finish()
            raise

    def run_planned(self, name: str, layout: Layout | str) -> None:
        """Run one strategy; where it cannot run, `layout` is a text that says why."""
        record = explain_unproved(name, self.proved) if self.proved else None
        if isinstance(layout, str):
            record = Record(name, "not_possible", layout)
        elif record is None:
            self.runs[name] = self._make(name, layout)
            return
        self.runs[name] = record = self._marked(record)
        records.write(record, self.out / name / "record.json")
        self.watcher.finished(self.title + name, record)

    def _make(self, name: str, layout: Layout) -> Record:
        """Make one run, which is interrupted and resumed where that is asked for."""
        second = self.second.get(name) if name != self.reference else None
        if self.stop is None or not isinstance(second, Layout):
            return self.made.make(name, self.job, name, layout.world_size)
        first, then = (name, layout.world_size), (self.stop.second(name), second.world_size)
        return self.made.make_interrupted(name, self.job, first, then, self.stop.step)

    def _run_control(self, control: Control) -> Record:
        """Launch a run under a strategy or variant with these changes in its settings.

        It saves no checkpoints: nothing goes on from it."""
        name, plain = control.strategy, self.job.model_copy(update={"checkpoint": Checkpoint()})
        job = with_settings(plain, name, control.changes)
        nproc = 1 if "emulate_replicas" in control.changes else self.runs[name].world_size
        return self.made.make(control.label, job, name, nproc, control.cores_for)

    def _name_the_rest(self) -> None:
        """Note what has not run, since the comparison was interrupted."""
        for name, layout in self.layouts.items():
            record = Record(name, "failed", INTERRUPTED)
            if isinstance(layout, str):
                record = Record(name, "not_possible", layout)
            self.runs.setdefault(name, self._marked(record))

    def _marked(self, record: Record) -> Record:
        """Return the record of a run that was not launched with the strategy of a variant."""
        variant_of, mark = resolve(self.job, record.strategy).variant_of, self.description["id"]
        return dataclasses.replace(record, variant_of=variant_of, comparison=mark)

    def finish(self) -> Comparison:
        """Judge every run, after the control runs that this needs, and write the comparison."""
        self._settle_reference()
        possible = [name for name, record in self.runs.items() if record.status != "not_possible"]
        parity = {name: self._judge(name) for name in possible}
        own = {found.reference for found in parity.values()}
        labels = [self.reference, *(n for n in self.controls if n in own or n.endswith(EMULATION))]
        fault = next((found for label in labels if (found := self._settle(label))), None)
        if fault:
            parity = {name: self._judge(name) for name in possible}
        if self.reference != PROXY:
            rule = rule_of(self.job, self.reference, self.runs)
            parity = name_suspect(parity, self.reference, self._engine_of, self._load, rule)
        result = Comparison(
            job=to_dict(self.asked),
            machine=describe_machine(),
            reference=self.reference,
            strategies=self.runs,
            parity=parity,
            ok=all(found.ok for found in parity.values()) and not self.interrupted,
            controls=self.controls,
            reference_fault=fault,
            best=find_best(self.runs, parity),
            id=self.description["id"],
        )
        report.write(result, self.out)
        if all(run.status != "failed" for run in self.runs.values()):
            remove_previous(self.out)
        print_warnings(report.tell_fault(result, ok=False))
        return result

    def _settle_reference(self) -> None:
        """Find what the runs are held against, and note which of them are too large to run here."""
        self.reference = find_reference(self.job, self.selection, self.runs, self.has_proxy)
        for name, record in find_too_large(self.selection, self.runs, self.reference).items():
            records.write(shorten(record), self.out / name / "record.json")
            self.runs[name] = record

    def _judge(self, name: str) -> Parity:
        if self.reference == PROXY:
            return self._judge_by_proxy(name)
        job = resolve(self.job, self.runs[name].strategy).job
        load = functools.cache(self._load)  # weights are read once, and let go with the verdict
        while True:
            known = self.runs, self.reference, self.controls
            found = judge_run(job, name, *known, load, self.layers)
            if isinstance(found, Parity):
                return self._with_reason(name, found)
            if self.interrupted:
                return self._interrupted()
            for control in found:
                self.controls[control.label] = self._run_control(control)

    def _engine_of(self, name: str) -> str:
        choice = resolve(self.job, self.runs[name].strategy)
        return registry.engine(choice.strategy, choice.job)

    def _settle(self, label: str) -> ReferenceFault | None:
        """Put a run of a reference that repeats itself in the place of one that was off."""
        if label not in self.runs and label not in self.controls:
            return None
        rule = rule_of(self.job, label, {**self.controls, **self.runs})
        return settle(label, self.runs, self.controls, self.out, self._load, rule)

    def _judge_by_proxy(self, name: str) -> Parity:
        if self.proved is None:
            return self._interrupted()
        return judge_by_proxy(self.job, name, self.runs, self.proved)

    def _interrupted(self) -> Parity:
        allowed = tolerance(self.job.train.precision)
        return Parity(False, None, None, allowed, reference=self.reference, reason=INTERRUPTED)

    def _with_reason(self, name: str, found: Parity) -> Parity:
        """Add why a run is not compared: it, or what it would be held against, has no result."""
        if found.state != "not_compared":
            return found
        reason = found.reason or self.runs[name].reason
        if self.runs[name].status == "ok" and not found.reason:
            emulation = name + EMULATION
            against = emulation if emulation in self.controls else found.reference
            against = against if against in self.controls else self.reference
            reference = self.controls.get(against) or self.runs[against]
            how = "failed" if reference.status == "failed" else "is not possible here"
            reason = f"the reference {against} {how}: {reference.reason}"
        return dataclasses.replace(found, reference=self.reference, reason=reason)

    def _load(self, label: str) -> Run:
        record = read_run(self.out / label)
        file = record.weights and record.weights.file
        if not file:
            raise ValueError(f"{label}: the record names no weights")
        return Run(record, SavedWeights(self.out / label / file))
