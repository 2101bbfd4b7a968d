"""Trains a job in one process. This is the only loop, and it never asks which strategy runs.

Instead it asks the engine for its receipt. `train` runs in every process that a launcher started,
or in a process alone; `hybrid.training.run` starts the processes. `hybrid.records` describes what a
run leaves in `out`."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import records
from ..checkpoint.weights import save_weights
from ..data import build_data
from ..data.batches import BatchPlan
from ..data.targets import targets_per_sample
from ..data.workers import AHEAD, end_workers
from ..engines.layers import compile_evidence
from ..engines.precision import name_of
from ..engines.protocol import Engine, StepResult, extend_receipt
from ..job.errors import PeerFailed, RunError, needs_room
from ..job.file import to_dict
from ..job.given import naming
from ..job.schema import Job, resolve_lengths
from ..job.variants import Choice, resolve
from ..launch.failures import RankStatus, leave_error
from ..launch.placement import OWN, Placement, find_placement
from ..launch.process_group import cleanup, join_process_group, restored_environment
from ..measure.clock import Instruments, StepCost
from ..measure.machine import describe_machine
from ..models.shared import build_shared
from ..models.vector_functions import call_vector_functions_once
from ..records import EvalResult, Record, StepEval, StepRecord, Weights
from ..strategies import registry
from .check import check_fingerprints, check_on_rank_0, print_warnings
from .evaluation import evaluate, make_loader
from .folder import CHECKPOINTS, begin_run, end_run
from .projection import project
from .step_log import StepLog, make_record
from .trackers import Trackers
from .tryout.samples import blame_samples

OnStep = Callable[[StepRecord, int], None]


@restored_environment()
def train(
    job: Job,
    strategy: str,
    out: Path | str | None = None,
    on_step: OnStep | None = None,
    placement: Placement | None = None,
    model: Callable[..., Any] | None = None,
    data: Callable[..., Any] | None = None,
) -> Record:
    """Train the job under one strategy in this process, and return the record on every rank.

    strategy: its name, or that of a variant in the job. placement: this process's rank; left out,
    it is found from a launcher's variables, and without these the process is alone. model, data:
    functions in place of those that the job names (`hybrid.job.given`). Rank 0 also writes
    `out/job.json`, `out/record.json`, `out/steps.jsonl` and `out/checkpoints/final/`. Raises
    JobError or Unsupported where the job cannot run, RunError where the run is not what was asked
    for, PeerFailed where another rank failed first, NoRoom where `out` cannot be written to."""
    if model is not None or data is not None:
        with naming(job, model, data) as named:
            return train(named, strategy, out, on_step, placement)
    if placement is None:
        placement = find_placement()
        print_warnings(job.warnings() if placement.rank == 0 else [])
    return _train_and_clean_up(job, strategy, Path(out) if out else None, on_step, placement)


def _train_and_clean_up(
    job: Job, strategy: str, out: Path | None, on_step: OnStep | None, placement: Placement
) -> Record:
    """Train, and leave nothing behind, whatever happens: the cause of an error comes first."""
    choice = resolve(job, strategy)
    status = RankStatus(job, placement, out / "logs" if out else None)
    folder = out if placement.rank == 0 else None
    recorded = folder if placement.launcher != OWN else None  # else `launch` begins and ends it
    try:
        if recorded:
            begin_run(recorded, job, choice)
        with needs_room(out):
            return _train(choice, placement, folder, on_step, status)
    except BaseException as error:
        # This comes before `cleanup`, which can wait for a peer that is gone.
        cause = leave_error(error, status)
        failure = error if cause is None else PeerFailed(cause.describe())
        if recorded:
            end_run(recorded, choice, placement.world_size, failure)
        if failure is not error:
            raise failure from error
        raise
    finally:
        end_workers()
        status.close()
        cleanup()


def _train(
    choice: Choice,
    placement: Placement,
    out: Path | None,
    on_step: OnStep | None,
    status: RankStatus,
) -> Record:
    call_vector_functions_once()
    job, strategy = choice.job, choice.strategy
    placement = registry.place(job, strategy, placement)
    if placement.world_size > 1:
        placement = join_process_group(placement, job.launch)
        status.start_heartbeat(placement)
    status.set("loading the data")
    data = build_data(job)
    warnings = list[str]()
    if placement.launcher != OWN:  # our own launcher has checked the job before it started us
        warnings = check_on_rank_0(job, strategy, data, placement)
    job = resolve_lengths(job, len(data[0]))
    assert job.train.steps is not None
    period = registry.steps_between_syncs(job, strategy)
    instruments = Instruments(
        job.train.steps, period, placement.device, job.train.compile, AHEAD * job.data.workers
    )
    try:
        with instruments.meter:
            status.set("building the model")
            layers, loss = build_shared(job, placement)
            status.parameters = sum(p.numel() for p in layers.names() if p.requires_grad)
            status.set("building the engine")
            names = layers.saved_names()
            engine = registry.open_engine(job, strategy, layers, loss, placement, data[0])
            del layers
        status.held = engine.num_held
        known = targets_per_sample(data[0], loss)
        rest = placement, out, on_step, status, names, *data, warnings, known
        run = _Run(job, choice, engine, instruments, *rest)
        return run.go()
    finally:
        instruments.close()


@dataclasses.dataclass
class _Run:
    """Holds one run in progress: the steps so far, and where they are written."""

    job: Job
    choice: Choice
    engine: Engine
    instruments: Instruments
    placement: Placement
    out: Path | None
    on_step: OnStep | None
    status: RankStatus
    saved_names: dict[str, str]  # of the final weights, with those in the engine's state
    train_set: Sequence[Any]
    test_set: Sequence[Any]
    warnings: list[str]  # of the try-out, where this process made it
    known: int | None = None  # the targets of each sample, where the train set tells it
    unread: deque[StepCost] = dataclasses.field(default_factory=deque)  # of steps without numbers
    evals: list[StepEval] = dataclasses.field(default_factory=list)

    def go(self) -> Record:
        """Train, evaluate, and put the record together."""
        if self.out:
            self.trackers = Trackers(self.job.log.trackers, self.out, to_dict(self.job))
        self.steps = StepLog(self.placement.rank == 0, self.out)
        data = check_fingerprints({"train": self.train_set, "test": self.test_set})
        initial = project(self.engine.state())
        first = self._train_steps()
        receipt = self._require_receipt()
        receipt.evidence["precision"]["reductions"] = self._reductions()
        result, file, batch = self._evaluate(), self._save(), self.job.train.global_batch
        record = Record(
            strategy=self.choice.name,
            variant_of=self.choice.variant_of,
            status="ok",
            world_size=self.placement.world_size,
            layout=self.engine.layout.to_dict(),
            receipt=receipt,
            steps=self.steps.all(),
            eval=result,
            throughput=self.instruments.throughput(batch, self.steps.tokens(batch)),
            memory=self.instruments.memory(),
            comm=self.instruments.comm(),
            weights=Weights(initial, first, file),
            drift=receipt.evidence.get("drift"),
            evals=self.evals,
            warnings=self.warnings,
            environment=describe_machine()
            | {"threads_per_rank": torch.get_num_threads(), "data": data}
            | {"known_bad_allowed": self.job.launch.allow_known_bad},
        )
        self.engine.close()
        if self.out:
            print_warnings(
                f"{self.choice.name}: {name} is not counted: its bytes are not in the figures"
                for name in (record.comm.not_counted if record.comm else [])
            )
            self.trackers.finish()
            records.write(record, self.out / "record.json")
        return record

    def _train_steps(self) -> dict[str, float]:
        """Take all optimizer steps; return the weights' projections after the first period."""
        job, engine = self.job, self.engine
        sizes = job.train.global_batch, engine.layout.dp, job.micro_batches(self.choice.strategy)
        self.plan = plan = BatchPlan(len(self.train_set), *sizes, job.train.seed)
        total, every = job.train.steps or 0, job.train.eval_every
        period = min(total, registry.steps_between_syncs(job, self.choice.strategy))
        loader = make_loader(job, plan, engine, self.train_set, range(total), self.known)
        first: dict[str, float] = {}
        for step in range(total):
            if every and step % every == 0:
                self._note_steps()
                self._evaluate()
            self.status.set(f"in step {step}")
            with self.instruments.loading():
                batches = loader.step(step)
            count = None if self.known is None else self.known * plan.batch_size(step)
            with self.instruments.step(step):
                engine.start_step(batches, count)
            self.unread.append(self.instruments.last_step)
            # The numbers of a step come with the next one. These steps need them at once.
            self._note_steps(wait=step == 0 or step + 1 in (period, total))
            if step == 0:
                self._require_receipt()
            if step + 1 == period:
                first = project(engine.state())
        loader.close()
        return first

    def _note_steps(self, wait: bool = True) -> None:
        """Note the steps whose numbers have come; `wait`: all that have been made."""
        try:
            for result in self.engine.results(wait):
                self._note(self.steps.count, result)
        finally:
            self.steps.write()

    def _note(self, step: int, result: StepResult) -> None:
        norm = result.grad_norm
        finite = math.isfinite(result.loss) and (norm is None or math.isfinite(norm))
        if not (finite or (result.skipped and math.isfinite(result.loss))):
            cause = None if result.targets else "no target of this batch counts"
            cause = cause or blame_samples(self.train_set, self.plan.batch(step))
            cause = cause or "lower optimizer.lr or set train.clip_norm"
            raise RunError(
                f"step {step}: loss {result.loss}, gradient norm {norm}: not finite; {cause}"
            )
        record = make_record(step, result)
        line = self.steps.add(record, self.instruments.read(self.unread.popleft()))
        if self.out:
            self.trackers.log(line, step)
        if self.on_step:
            self.on_step(record, self.job.train.steps or 0)

    def _evaluate(self) -> EvalResult:
        self.status.set(f"in the evaluation after {self.steps.count} steps")
        micro_batches = self.job.micro_batches(self.choice.strategy)
        result = evaluate(self.engine, self.test_set, self.job, micro_batches)
        self.evals.append(StepEval(self.steps.count, result))
        if self.out:
            self.trackers.log_eval(records.to_dict(result), self.steps.count)
        return result

    def _reductions(self) -> str:
        """Return the dtype of reductions for the precision ledger; only the instruments know it.

        A process alone reduces nothing, though it may call collectives."""
        dtype = self.instruments.reduced_in() if self.placement.world_size > 1 else None
        return name_of(getattr(torch, dtype)) if dtype else "none"

    def _require_receipt(self) -> records.Receipt:
        receipt = self.engine.receipt()
        seen = [d for d in receipt.evidence.get("sample_digest_by_rank", []) if d]
        if len(seen) != len(set(seen)):
            reason = f"data-parallel ranks trained on the same samples: {seen}"
            receipt = records.Receipt(False, receipt.evidence, reason)
        receipt = extend_receipt(receipt, *compile_evidence(self.job))
        if not receipt.engaged:
            raise RunError(f"receipt refused: {self.choice.name} was asked for; {receipt.reason}")
        return receipt

    def _save(self) -> str | None:
        self.status.set("gathering the weights")
        state = self.engine.state()
        if not self.out:
            return None
        about = {"step": self.steps.count, "strategy": self.choice.name}
        path = save_weights(state, self.out / CHECKPOINTS / "final", about, self.saved_names)
        return str(path.relative_to(self.out))
