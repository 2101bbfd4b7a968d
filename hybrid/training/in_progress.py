"""Holds one run in progress on one rank: what the loop trains, and what becomes of it."""

import dataclasses
import functools
import json
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import records
from ..checkpoint.gathering import WholeWeights
from ..checkpoint.names import CHECKPOINTS
from ..checkpoint.weights import save_weights
from ..data.batches import BatchPlan
from ..data.loader import MicroBatch
from ..engines.layers import compile_evidence
from ..engines.precision import name_of
from ..engines.protocol import Engine, extend_receipt
from ..job.errors import RunError
from ..job.file import to_dict
from ..job.schema import Job
from ..job.variants import Choice
from ..launch.exchange import gather_objects
from ..launch.failures import RankStatus
from ..launch.placement import Placement
from ..launch.stopping import StopSignals, told
from ..measure.clock import Instruments, StepCost
from ..measure.machine import describe_machine
from ..measure.traffic import uncounted
from ..records import EvalResult, Receipt, Record, StepEval, StepRecord, Weights
from ..records.steps import shorten
from ..strategies import registry
from .check import check_fingerprints, print_warnings
from .checkpointing import Checkpoints
from .evaluation import evaluate, make_loader
from .folder import comparison_of
from .projection import project
from .step_log import StepLog
from .trackers import Trackers

OnStep = Callable[[StepRecord, int], None]


@dataclasses.dataclass
class RunInProgress:
    """Holds one run: the steps so far, where they are written, and its checkpoints."""

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
    checkpoints: Checkpoints
    plan: BatchPlan
    stops: StopSignals
    known: int | None = None  # the targets of each sample, where the train set tells it
    unread: deque[StepCost] = dataclasses.field(default_factory=deque)  # of steps without numbers
    back: dict[int, int] = dataclasses.field(default_factory=dict)  # `rolled_back_to` of steps
    evals: list[StepEval] = dataclasses.field(default_factory=list)
    initial: dict[str, float] = dataclasses.field(default_factory=dict)  # projections of weights
    first: dict[str, float] = dataclasses.field(default_factory=dict)  # after the first period
    weights_from: dict[str, Any] | None = None  # what `model.weights` named

    def begin(self) -> None:
        """Open what the run writes, and load what it goes on from."""
        if self.out:
            self.trackers = Trackers(self.job.log.trackers, self.out, to_dict(self.job))
        self.data = check_fingerprints({"train": self.train_set, "test": self.test_set})
        self.initial = project(self.engine.weights())
        saved = self.checkpoints.values
        self.steps = StepLog(
            self.placement.rank == 0, self.out, self.checkpoints.start, saved.get("samples", 0)
        )
        if saved:
            self.status.set("loading the checkpoint")
            self.checkpoints.load(self._first_batches())
            self._note_saved()
            if self.engine.guard:
                self.engine.guard.set_state(self.checkpoints.saved_record.get("guard", {}))
            first = self.checkpoints.saved_record.get("first", {})
            self.first = {name: float(number) for name, number in first.items()}
            self.evals = [
                records.from_dict(StepEval, one)
                for one in self.checkpoints.saved_record.get("evals", [])
            ]
        print_warnings(self.engine.notes if self.placement.rank == 0 else [])
        self.warnings += self.engine.notes

    def _first_batches(self) -> Sequence[MicroBatch]:
        """Return this rank's micro-batches of the coming step, or of the last where none comes."""
        step = min(self.steps.count, (self.job.train.steps or 1) - 1)
        rest = self.engine, self.train_set, range(step, step + 1), self.known
        loader = make_loader(self.job, self.plan, *rest)
        batches = loader.step(step)
        loader.close()
        return batches

    def save_state(self, hurried: bool = False) -> None:
        """Save the state of the training after the steps so far; collective.

        hurried: without the evaluation by which the best checkpoint is kept."""
        if self.job.checkpoint.evaluates and not hurried:
            self.evaluate()
        steps = self.steps
        self.status.set(f"saving the state after {steps.count} steps")
        evals = [records.to_dict(one) for one in self.evals]
        record: dict[str, Any] = {"first": self.first, "evals": evals}
        if self.engine.guard:
            record["guard"] = self.engine.guard.state()
        if steps.count == self.job.train.steps:
            record["receipt"] = records.to_dict(self.require_receipt())
        with uncounted(), self.status.unhurried():  # it is no part of a step
            # JSON has no NaN and no infinity, as an evaluation may have: they stand as text.
            plain = json.loads(records.dumps(record))
            self.checkpoints.save(steps.count, steps.samples, plain, steps.changed)
        steps.changed = False
        self._note_saved()

    def _note_saved(self) -> None:
        """Note for a signal which state is on the disk: an asynchronous save can be under way."""
        if self.checkpoints.committed:
            self.stops.saved = self.checkpoints.committed.step

    def ask_all(self) -> int:
        """Return the signal that told a rank to stop, 0: none; collective, so not in a step."""
        return max(gather_objects(told())) if self.checkpoints.saves else 0

    def leave(self, signal: int) -> NoReturn:
        """Save the state after the steps so far, if it is not, and end the run; collective.

        Raises Stopped on every rank. signal: the number of the one that told a rank to stop."""
        self.checkpoints.wait()
        self._note_saved()
        if self.stops.saved != self.steps.count and self.steps.count:
            self.save_state(hurried=True)
            self.checkpoints.wait()
            self._note_saved()
        raise self.stops.stopped(signal, agreed=True)

    @functools.cached_property
    def period(self) -> int:
        """Return the optimizer steps after which the communication repeats."""
        every = registry.steps_between_syncs(self.job, self.choice.strategy)
        return min(self.job.train.steps or 0, every)

    def evaluate(self) -> EvalResult:
        """Evaluate on the test set after the steps so far, unless that was done; collective."""
        if self.evals and self.evals[-1].step == self.steps.count:
            return self.evals[-1].result
        self.status.set(f"in the evaluation after {self.steps.count} steps")
        micro_batches = self.job.micro_batches(self.choice.strategy)
        # An evaluation waits as a step does, but where torch.compile compiles for it.
        self.status.hurry(in_step=not self.job.train.compile)
        with uncounted():  # it is no part of a step
            result = evaluate(self.engine, self.test_set, self.job, micro_batches)
        self.evals.append(StepEval(self.steps.count, result))
        if self.out:
            self.trackers.log_eval(records.to_dict(result), self.steps.count)
        return result

    def require_receipt(self) -> Receipt:
        """Return the receipt of what really runs; raises RunError where that was not asked for."""
        if self.checkpoints.start == self.job.train.steps:  # no step is left to show anything
            return records.from_dict(Receipt, self.checkpoints.saved_record["receipt"])
        receipt = self.engine.receipt()
        seen = [d for d in receipt.evidence.get("sample_digest_by_rank", []) if d]
        if len(seen) != len(set(seen)):
            reason = f"data-parallel ranks trained on the same samples: {seen}"
            receipt = Receipt(False, receipt.evidence, reason)
        receipt = extend_receipt(receipt, *compile_evidence(self.job))
        if not receipt.engaged:
            raise RunError(f"receipt refused: {self.choice.name} was asked for; {receipt.reason}")
        return receipt

    def _reductions(self) -> str:
        """Return the dtype of reductions for the precision ledger; only the instruments know it.

        A process alone reduces nothing, though it may call collectives."""
        dtype = self.instruments.reduced_in() if self.placement.world_size > 1 else None
        return name_of(getattr(torch, dtype)) if dtype else "none"

    def _save(self) -> str | None:
        self.status.hurry(in_step=False)
        self.status.set("gathering the weights")
        if not any(gather_objects(self.out is not None)):
            return None
        weights = WholeWeights(self.engine.weights())
        if not self.out:
            weights.send(self.saved_names.values())
            return None
        about = {"step": self.steps.count, "strategy": self.choice.name}
        parts = [weights.part(key, name) for key, name in self.saved_names.items()]
        path = save_weights(parts, self.out / CHECKPOINTS / "final", about)
        return str(path.relative_to(self.out))

    def _end_steps(self) -> tuple[list[StepRecord], dict[str, int]]:
        """Wait until the last checkpoint is saved, and return the steps for the record."""
        self.status.set("writing the last checkpoint")
        self.checkpoints.wait()
        return self.steps.all()

    def _shorten(self, record: Record) -> Record:
        """Shorten the record of a run with a folder; without one it alone has the steps."""
        return shorten(record) if self.checkpoints.out else record

    def _comparison(self) -> str | None:
        return comparison_of(self.out) if self.out else None

    def end_early(self) -> Record:
        """End before the last step, as was asked for; another run goes on from what is saved."""
        self.status.hurry(in_step=False)
        self.checkpoints.wait()
        steps, left_out = self.steps.all()
        record = Record(
            strategy=self.choice.name,
            status="failed",
            reason=records.INTERRUPTED,
            world_size=self.placement.world_size,
            layout=self.engine.layout.to_dict(),
            steps=steps,
            left_out=left_out,
            evals=self.evals,
            variant_of=self.choice.variant_of,
            checkpoint=self.checkpoints.committed,
            resumed_from=self.checkpoints.resumed_from,
            comparison=self._comparison(),
        )
        record = self._shorten(record)
        self.engine.close()
        if self.out:
            self.trackers.finish()
            records.write(record, self.out / "record.json")
        return record

    def finish(self) -> Record:
        """Evaluate, save the weights, and put the record together."""
        receipt = self.require_receipt()
        receipt.evidence["precision"]["reductions"] = self._reductions()
        result, batch = self.evaluate(), self.job.train.global_batch
        file, (steps, left_out) = self._save(), self._end_steps()
        record = Record(
            strategy=self.choice.name,
            variant_of=self.choice.variant_of,
            status="ok",
            world_size=self.placement.world_size,
            layout=self.engine.layout.to_dict(),
            receipt=receipt,
            steps=steps,
            left_out=left_out,
            eval=result,
            throughput=self.instruments.throughput(batch, self.steps.tokens(batch)),
            memory=self.instruments.memory(),
            comm=self.instruments.comm(),
            weights=Weights(self.initial, self.first, file),
            drift=receipt.evidence.get("drift"),
            evals=self.evals,
            warnings=self.warnings,
            environment=describe_machine()
            | {"threads_per_rank": torch.get_num_threads(), "data": self.data}
            | {"known_bad_allowed": self.job.launch.allow_known_bad},
            checkpoint=self.checkpoints.committed,
            resumed_from=self.checkpoints.resumed_from,
            weights_from=self.weights_from,
            comparison=self._comparison(),
        )
        self.engine.close()
        if self.out:
            print_warnings(
                f"{self.choice.name}: {name} is not counted: its bytes are not in the figures"
                for name in (record.comm.not_counted if record.comm else [])
            )
            self.trackers.finish()
            records.write(shorten(record), self.out / "record.json")
        return self._shorten(record)
