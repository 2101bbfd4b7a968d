"""Trains a job in one process. This is the only loop, and it never asks which strategy runs.

Instead it asks the engine for its receipt. `train` runs in every process that a launcher started,
or in a process alone; `hybrid.training.run` starts the processes. `hybrid.records` describes what a
run leaves in `out`."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoint.writer import end_writers
from ..data import build_data
from ..data.batches import BatchPlan
from ..data.steps import StepLoader
from ..data.workers import WorkerLoader, end_workers
from ..engines.protocol import StepResult
from ..job.errors import Refused, RunError, Stopped, needs_room
from ..job.given import naming
from ..job.outputs import read_folder
from ..job.schema import Job, resolve_lengths
from ..job.variants import Choice, resolve
from ..launch.environment import restored_environment
from ..launch.exchange import gather_objects
from ..launch.failures import RankStatus, leave_error
from ..launch.placement import OWN, Placement, find_placement
from ..launch.process_group import cleanup
from ..launch.stopping import StopSignals, requeue, unbroken
from ..measure.traffic import uncounted
from ..models.vector_functions import call_vector_functions_once
from ..records import Record
from ..strategies import registry
from .beginning import begin_record, build, decide_together, make_instruments, meet
from .check import check_on_rank_0, print_warnings
from .checkpointing import Checkpoints
from .claiming import claim_for_run
from .evaluation import make_loader
from .folder import end_run
from .guard import go_back, rolls_back, warn
from .in_progress import OnStep, RunInProgress
from .leaving import as_failure, failure_of
from .projection import project
from .step_log import make_record
from .tryout.samples import blame_samples


@restored_environment()
def train(
    job: Job,
    strategy: str,
    out: Path | str | None = None,
    on_step: OnStep | None = None,
    placement: Placement | None = None,
    model: Callable[..., Any] | None = None,
    data: Callable[..., Any] | None = None,
    resume: Path | str | None = None,
    until: int | None = None,
) -> Record:
    """Train the job under one strategy in this process, and return the record on every rank.

    strategy: its name, or that of a variant in the job. placement: this process's rank; left out,
    it is found from a launcher's variables, and without these the process is alone. model, data:
    functions in place of those that the job names (`hybrid.job.given`). resume: "auto", or the
    folder of a checkpoint or of a run, to go on from. until: the run ends after so many steps,
    saved and not evaluated. Rank 0 also writes `out/job.json`,
    `out/record.json`, `out/steps.jsonl` and `out/checkpoints/final/`. Raises JobError or
    Unsupported where the job cannot run, RunError where the run is not what was asked for,
    PeerFailed where another rank failed first, NoRoom where `out` cannot be written to."""
    if model is not None or data is not None:
        with naming(job, model, data) as named:
            return train(named, strategy, out, on_step, placement, resume=resume, until=until)
    if placement is None:
        placement = find_placement()
        print_warnings(job.warnings() if placement.rank == 0 else [])
    folder = None if out is None else read_folder(out)
    with claim_for_run(folder, placement, resume is not None):
        return _train_and_clean_up(job, strategy, folder, on_step, placement, resume, until)


def _train_and_clean_up(
    job: Job,
    strategy: str,
    out: Path | None,
    on_step: OnStep | None,
    placement: Placement,
    resume: Path | str | None,
    until: int | None,
) -> Record:
    """Train, and leave nothing behind, whatever happens: the cause of an error comes first."""
    choice = resolve(job, strategy)
    status = RankStatus(job, placement, out / "logs" if out else None)
    stops = StopSignals()
    stoppable = out is not None and job.checkpoint.every is not None
    with stops if stoppable else contextlib.nullcontext():
        try:
            with needs_room(out):
                record = _train(choice, placement, out, on_step, status, stops, resume, until)
            status.end()
            return record
        except BaseException as raised:
            stops.leaves = True
            error = as_failure(raised)
            # This comes before `cleanup`, which can wait for a peer that is gone.
            with unbroken(placement.under_foreign_launcher):
                failure = failure_of(error, leave_error(error, status), stops)
                _end_badly(choice, placement, out, failure)
            if failure is not raised:
                raise failure from raised
            raise
        finally:
            end_workers()
            end_writers()
            status.close()
            cleanup(status.failed)


def _end_badly(
    choice: Choice, placement: Placement, out: Path | None, failure: BaseException
) -> None:
    """Write the record of a run that ends so, and say it where nobody else does."""
    # `launch` begins and ends the record of a run that it started.
    if out and placement.rank == 0 and placement.launcher != OWN:
        if not isinstance(failure, Refused):
            end_run(out, choice, placement.world_size, failure)
        if isinstance(failure, Stopped):
            failure.tell(requeue(failure))
    if isinstance(failure, Stopped):
        failure.told = True  # by rank 0, or by the process that started this one
        if failure.agreed:  # a launcher may end the others when the first one leaves
            with contextlib.suppress(RuntimeError):  # or has done so
                gather_objects(None)


def _train(
    choice: Choice,
    placement: Placement,
    out: Path | None,
    on_step: OnStep | None,
    status: RankStatus,
    stops: StopSignals,
    resume: Path | str | None,
    until: int | None,
) -> Record:
    call_vector_functions_once()
    job, strategy = choice.job, choice.strategy
    placement = registry.place(job, strategy, placement)
    placement = meet(placement, job, status)
    status.set("loading the data")
    data = build_data(job)
    choice = dataclasses.replace(choice, job=resolve_lengths(job, len(data[0])))
    start = decide_together(choice, placement, out, resume, until)
    if start.ended:
        return start.ended
    warnings = list[str]()
    if placement.launcher != OWN:  # our own launcher has checked the job before it started us
        warnings = begin_record(status.job, choice, placement, out, start)
        warnings += check_on_rank_0(job, strategy, data, placement)
    job, chosen = choice.job, start.chosen
    instruments = make_instruments(job, strategy, placement, chosen)
    try:
        with instruments.meter:
            engine, known, names, weights_from = build(job, strategy, placement, status, data[0])
        sizes = job.train.global_batch, engine.layout.dp, job.micro_batches(strategy)
        plan = BatchPlan(len(data[0]), *sizes, job.train.seed)
        folder = out if placement.rank == 0 else None
        saved = Checkpoints(job, choice, engine, placement, out, chosen, until)
        rest = placement, folder, on_step, status, names, *data, warnings, saved, plan, stops, known
        run = _Run(job, choice, engine, instruments, *rest, weights_from=weights_from)
        return run.go()
    finally:
        instruments.close()


class _Run(RunInProgress):
    """Is one run in progress, with the loop."""

    told = 0  # the number of the signal that told a rank to stop, as all ranks know it

    def go(self) -> Record:
        """Train, evaluate, and put the record together."""
        self.begin()
        try:
            self._train_steps()
        finally:
            self.steps.write()
        return self.finish() if self.checkpoints.until is None else self.end_early()

    def _train_steps(self) -> None:
        """Take all optimizer steps that are left."""
        job, engine, saved = self.job, self.engine, self.checkpoints
        total, every, start = saved.end, job.train.eval_every, saved.start
        self.stops.waits = saved.saves
        steps = range(start, total)
        loader = make_loader(job, self.plan, engine, self.train_set, steps, self.known)
        for step in steps:
            if every and step % every == 0:
                self._note_steps()
                self.evaluate()
                self._between_steps()
            if self.told:
                self._leave(loader)
            self.status.hurry(in_step=not self._compiles_in(step - start))
            self.status.set(f"in step {step}", step)
            self.instruments.step(step - start, self._load(loader, step))
            self.unread.append(self.instruments.last_step)
            # The numbers of a step come with the next one. These steps need them at once.
            done, back = step + 1, rolls_back(self, step)
            due = saved.is_due(done)
            at_once = back or due or step == start or done in (self.period, total)
            self._note_steps(wait=at_once)
            if back:
                go_back(self, step)
            if step == start:
                self.require_receipt()
            if done == self.period:
                with uncounted():  # it is no part of a step
                    self.first = project(engine.weights())
            saved.check()
            self._note_saved()
            if due:
                self.save_state()
                self._between_steps()
        if self.told:
            self._leave(loader)
        loader.close()
        self.stops.act_at_once()

    def _load(self, loader: StepLoader | WorkerLoader, step: int) -> Callable[[], None]:
        """Load the micro-batches of a step, and return what makes it.

        Nothing else holds them, so that those of the next step do not come beside them."""
        self.instruments.begin_loading()
        batches = loader.step(step)
        self.instruments.end_loading()
        return partial(self.engine.start_step, batches, *self.plan.totals(step, self.known))

    def _compiles_in(self, step: int) -> bool:
        """Tell whether torch.compile can compile in a step of this run, for unlike times on ranks.

        It does in the first one, and once more where the collective counter has been removed."""
        return self.job.train.compile and step <= self.instruments.counted.stop

    def _between_steps(self) -> None:
        """Say that what came before is in no step, and ask for signals; collective."""
        self.instruments.interrupt()
        self.told = self.told or self.ask_all()

    def _leave(self, loader: StepLoader | WorkerLoader) -> NoReturn:
        """Save the state and end the run, since a rank was told to stop."""
        loader.close()
        self._note_steps()
        with self.status.unhurried():
            self.leave(self.told)

    def _note_steps(self, wait: bool = True) -> None:
        """Note the steps whose numbers have come; `wait`: all that have been made."""
        results = self.engine.results(wait)
        for result in results:
            self._note(self.steps.count, result)
        if wait or results:
            self.steps.write(now=wait)

    def _note(self, step: int, result: StepResult) -> None:
        norm = result.grad_norm
        finite = math.isfinite(result.loss) and (norm is None or math.isfinite(norm))
        if not (finite or result.fault or (result.skipped and math.isfinite(result.loss))):
            cause = None if result.targets else "no target of this batch counts"
            cause = cause or blame_samples(self.train_set, self.plan.batch(step))
            cause = cause or "lower optimizer.lr or set train.clip_norm"
            raise RunError(
                f"step {step}: loss {result.loss}, gradient norm {norm}: not finite; {cause}"
            )
        self.told = self.told or result.stop
        record = make_record(step, result, self.back.get(step))
        if result.fault:
            warn(self, record, result.fault)
        line = self.steps.add(record, self.instruments.read(self.unread.popleft()))
        if self.out:
            self.trackers.log(line, step)
        if self.on_step:
            self.on_step(record, self.job.train.steps or 0)
