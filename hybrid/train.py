"""The only training loop. It never asks which strategy runs; it asks the engine for its receipt.

`train` runs in the processes that a launcher started (or in this one alone); `hybrid.launch` starts
some. What it leaves in `out` is described in `hybrid.records`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import environment, processes, rank, records, weights
from .config import Job, resolve_lengths
from .data import build_data
from .data.batches import BatchPlan
from .evaluate import evaluate, step_batches
from .job_file import to_dict
from .launchers import Ranks
from .liveness import Liveness
from .measure.instruments import Instruments
from .models.shared import build_shared
from .records import EvalResult, Record, StepEval, StepRecord, Weights
from .strategies import registry
from .strategies._model import compile_evidence
from .strategies._precision import name_of
from .strategies.base import Engine, RunError, StepResult, extend_receipt
from .trackers import Trackers

OnStep = Callable[[StepRecord, int], None]


@processes.environment_kept()
def train(
    job: Job, strategy: str, out: Path | None = None, on_step: OnStep | None = None
) -> Record:
    """Train the job under one strategy, on the ranks of the environment.

    Returns the record, on every rank; rank 0 also writes `out/record.json`, `out/steps.jsonl` and
    `out/checkpoints/final/`. Raises RunError where the run is not what was asked for, Unsupported
    or JobError before it starts.
    """
    at = rank.Whereabouts(job, rank.logs_folder(out))
    try:
        ranks = Ranks.from_env()
        if ranks.world_size > 1 and (store := processes.join(ranks, job.launch)):
            at.peers = Liveness(store, ranks.rank, ranks.world_size, lambda: at.doing)
        return _train(job, strategy, ranks, out, on_step, at)
    except BaseException as error:
        # Before leaving the group, which can wait for a peer that is gone.
        cause = rank.leave_error(error, at)
        if cause:
            raise rank.PeerFailed(cause) from error
        raise
    finally:
        at.close()
        processes.cleanup()


def _train(
    job: Job,
    strategy: str,
    ranks: Ranks,
    out: Path | None,
    on_step: OnStep | None,
    at: rank.Whereabouts,
) -> Record:
    # torch's vector functions once on one thread. Three one-process runs of some hundreds had their
    # first results 1e-8 (fp64) or 1e-7 (fp32) off, as if two threads had met in the first call.
    torch.tanh(torch.zeros(1))
    at.move("loading the data")
    train_set, test_set = build_data(job)
    job = resolve_lengths(job, len(train_set))
    assert job.train.steps is not None
    period = registry.get(strategy).period(job)
    instruments = Instruments(job.train.steps, period, job.train.compile)
    try:
        with instruments.meter:
            at.move("building the model")
            layers, loss = build_shared(job, ranks)
            at.parameters = sum(p.numel() for p in layers.names() if p.requires_grad)
            at.move("building the engine")
            engine = registry.open_engine(job, strategy, layers, loss)
            del layers
        at.held = engine.num_held
        run = _Run(job, strategy, engine, instruments, out, on_step, at)
        return run.go(train_set, test_set)
    finally:
        instruments.close()


class _Run:
    """One run in progress: the steps so far, and where they are written."""

    def __init__(
        self,
        job: Job,
        strategy: str,
        engine: Engine,
        instruments: Instruments,
        out: Path | None,
        on_step: OnStep | None,
        at: rank.Whereabouts,
    ) -> None:
        self.job, self.strategy, self.engine = job, strategy, engine
        self.instruments, self.on_step, self.at = instruments, on_step, at
        self.ranks = Ranks.from_env()
        self.out = out if self.ranks.rank == 0 else None
        self.data: dict[str, str] = {}
        self.steps: list[StepRecord] = []
        self.evals: list[StepEval] = []
        if self.out:
            self.out.mkdir(parents=True, exist_ok=True)
            self.trackers = Trackers(job.log.trackers, self.out, to_dict(job))
            (self.out / "steps.jsonl").write_text("")

    def go(self, train_set: Any, test_set: Any) -> Record:
        """Train, evaluate, and put the record together."""
        micro_batches = self.job.micro_batches(self.strategy)
        self._check_data(train_set, test_set)
        initial = weights.project(self.engine.state())
        first = self._steps(train_set, test_set, micro_batches)
        receipt = self._require_receipt()
        receipt.evidence["precision"]["reductions"] = self._reductions()
        result = self._evaluate(test_set, micro_batches)
        file = self._save()
        record = Record(
            strategy=self.strategy,
            status="ok",
            world_size=self.ranks.world_size,
            layout=self.engine.layout.to_dict(),
            receipt=receipt,
            steps=self.steps,
            eval=result,
            throughput=self.instruments.throughput(self.job.train.global_batch, self._tokens()),
            memory=self.instruments.memory(),
            comm=self.instruments.comm(),
            weights=Weights(initial, first, file),
            drift=receipt.evidence.get("drift"),
            evals=self.evals,
            environment=environment.describe()
            | {"threads_per_rank": torch.get_num_threads(), "data": self.data},
        )
        self.engine.close()
        if self.out:
            self.trackers.finish()
            records.write(record, self.out / "record.json")
        return record

    def _check_data(self, train_set: Any, test_set: Any) -> None:
        """RunError unless all ranks have the same data, as far as the sets can say."""
        sets = {"train": train_set, "test": test_set}
        self.data = {n: str(s.fingerprint) for n, s in sets.items() if hasattr(s, "fingerprint")}
        for other, theirs in enumerate(processes.gather_objects(self.data)):
            if theirs != self.data:
                raise RunError(f"rank {other} has other data: {theirs}, here {self.data}")

    def _steps(self, train_set: Any, test_set: Any, micro_batches: int) -> dict[str, float]:
        """All optimizer steps; returns the weights' projections after the first period."""
        job, engine = self.job, self.engine
        plan = BatchPlan(
            len(train_set),
            job.train.global_batch,
            engine.layout.dp,
            micro_batches,
            job.train.seed,
        )
        total = job.train.steps or 0
        period = min(total, registry.get(self.strategy).period(job))
        first: dict[str, float] = {}
        every = job.train.eval_every
        for step in range(total):
            if every and step % every == 0:
                self._evaluate(test_set, micro_batches)
            self.at.move(f"in step {step}")
            batches = step_batches(plan, engine, train_set, step)
            with self.instruments.step(step):
                result = engine.train_step(batches)
            self._note(step, result, total)
            if step == 0:
                self._require_receipt()
            if step + 1 == period:
                first = weights.project(engine.state())
        return first

    def _note(self, step: int, result: StepResult, total: int) -> None:
        finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        if not (finite or (result.skipped and math.isfinite(result.loss))):
            raise RunError(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite; "
                "lower optimizer.lr or set train.clip_norm"
            )
        record = StepRecord(
            step=step,
            loss=result.loss,
            grad_norm=None if result.skipped else result.grad_norm,
            lr=result.lr,
            samples=result.samples,
            sample_digest=result.sample_digest,
            targets=result.targets,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
        )
        self.steps.append(record)
        if self.out:
            line = records.to_dict(record) | self.instruments.last_step()
            with (self.out / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.trackers.log(line, step)
        if self.on_step:
            self.on_step(record, total)

    def _evaluate(self, test_set: Any, micro_batches: int) -> EvalResult:
        self.at.move(f"in the evaluation after {len(self.steps)} steps")
        result = evaluate(self.engine, test_set, self.job, micro_batches)
        self.evals.append(StepEval(len(self.steps), result))
        if self.out:
            self.trackers.log_eval(records.to_dict(result), len(self.steps))
        return result

    def _reductions(self) -> str:
        """The ledger's last row, which only the instruments can read."""
        dtype = self.instruments.reduced_in()
        return name_of(getattr(torch, dtype)) if dtype else "none"

    def _tokens(self) -> int | None:
        """Targets of a whole batch, where a sample has several: tokens."""
        most = max(step.targets or 0 for step in self.steps)
        return most if most > self.job.train.global_batch else None

    def _require_receipt(self) -> records.Receipt:
        receipt = self.engine.receipt()
        seen = [d for d in receipt.evidence.get("sample_digest_by_rank", []) if d]
        if len(seen) != len(set(seen)):
            reason = f"data-parallel ranks trained on the same samples: {seen}"
            receipt = records.Receipt(False, receipt.evidence, reason)
        receipt = extend_receipt(receipt, *compile_evidence(self.job))
        if not receipt.engaged:
            raise RunError(f"receipt refused: {self.strategy} was asked for; {receipt.reason}")
        return receipt

    def _save(self) -> str | None:
        self.at.move("gathering the weights")
        state = self.engine.state()
        if not self.out:
            return None
        about = {"step": len(self.steps), "strategy": self.strategy}
        path = weights.save(state, self.out / "checkpoints" / "final", about)
        return str(path.relative_to(self.out))
