"""Sums of one step or one evaluation: the one place where a loss is taken.

Every engine computes its loss through `Tally`, so that sums, counts and sample ids come from the
batch that was really used, without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch

from ..data.loader import MicroBatch
from ..job.errors import RunError
from ..launch.exchange import gather_rows
from ..models.losses import IGNORED_TARGET, Loss
from ..records import EvalResult
from .protocol import StepResult

RANKS_AGREE = 1e-6  # relative; norms and rates come out of one all-reduce and the same arithmetic


def real_rows(value: Any, rows: int, padded: int) -> Any:
    """`value` without the rows that pad a micro-batch of `rows` samples to `padded`."""
    if rows == padded:
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(real_rows(v, rows, padded) for v in value)
    if value.dim() == 0 or value.shape[0] != padded:
        raise RunError(
            f"a padded micro-batch needs outputs and targets with one row a sample ({padded}), "
            f"got shape {list(value.shape)}; choose train.global_batch so that it divides evenly"
        )
    return value[:rows]


def num_rows(value: Any) -> int:
    """Rows of a micro-batch's input or target, padding included."""
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value.shape[0]


def count_targets(loss: Loss, micro_batch: MicroBatch) -> int:
    """How many targets `loss` will count in a micro-batch, before there is an output.

    Integer targets count unless they are -100; for others the loss itself is asked, with zeros in
    place of the output. `Tally` checks the answer against what the loss then really counted.
    """
    rows = len(micro_batch.ids)
    if rows == 0:
        return 0
    target = real_rows(micro_batch.target, rows, num_rows(micro_batch.target))
    if not target.is_floating_point():
        return int((target != IGNORED_TARGET).sum())
    return int(loss(torch.zeros_like(target), target)[1])


def hash_ids(ids: torch.Tensor, salt: int | torch.Tensor = 0) -> int:
    """Sum modulo 2**64 of a hash of each (id, salt): the same for any order and any split of the
    ids. The hash is splitmix64 (Steele, Lea and Flood 2014)."""
    with numpy.errstate(over="ignore"):
        z = ids.cpu().numpy().astype(numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        more = salt.cpu().numpy() if isinstance(salt, torch.Tensor) else numpy.array(salt)
        z += more.astype(numpy.uint64) * numpy.uint64(0xD1B54A32D192ED03) + numpy.uint64(1)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        return int((z ^ (z >> numpy.uint64(31))).sum(dtype=numpy.uint64))


class TallyRow(NamedTuple):
    """What one rank counted. `target_kind`: 1 where targets are classes, 2 where a sample has
    several of them (tokens), 0 otherwise."""

    loss_sum: float
    targets: int
    samples: int
    digest: int
    correct: int
    predictions: int
    target_kind: int


class StepRow(NamedTuple):
    """What ranks tell one another after a step. `input_digest` is of the samples that a pipeline's
    first stage read; 0 elsewhere."""

    loss_sum: float
    targets: int
    samples: int
    digest: int
    grad_norm: float
    lr: float
    input_digest: int = 0


class Tally:
    """Sums over the micro-batches of one step or one evaluation, on one rank."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = self.digest = self.predictions = 0
        self.classes = self.tokens = False

    def add(
        self, loss: Loss, output: Any, micro_batch: MicroBatch, score: bool = False
    ) -> torch.Tensor:
        """Take the loss of one micro-batch and return its sum, with its graph; `score` also counts
        correct classes. A micro-batch of padding alone returns a zero that still has a graph."""
        rows, padded = len(micro_batch.ids), num_rows(micro_batch.target)
        if rows == 0:
            first = output[0] if isinstance(output, (tuple, list)) else output
            return first.sum() * 0.0
        output = real_rows(output, rows, padded)
        target = real_rows(micro_batch.target, rows, padded)
        loss_sum, count = loss(output, target)
        self.loss_sum += loss_sum.detach().to(torch.float64)
        self.count += count
        self.samples += rows
        self.digest = (self.digest + hash_ids(micro_batch.ids)) % 2**64
        if score:
            self._score(output, target, micro_batch.ids)
        return loss_sum

    def _score(self, output: Any, target: Any, ids: torch.Tensor) -> None:
        if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
            return
        if target.is_floating_point() or output.dim() != target.dim() + 1:
            return
        self.classes, self.tokens = True, target.dim() > 1
        predicted = output.argmax(-1)
        self.correct += ((predicted == target) & (target != IGNORED_TARGET)).sum()
        flat = predicted.reshape(len(ids), -1)
        places = torch.arange(flat.shape[1], device=flat.device) * 2**32
        mixed = (flat + places).flatten() + 1
        spread = ids.repeat_interleave(flat.shape[1])
        self.predictions = (self.predictions + hash_ids(spread, mixed)) % 2**64

    def row(self) -> TallyRow:
        """The sums so far, as numbers."""
        return TallyRow(
            self.loss_sum.item(),
            int(self.count),
            self.samples,
            self.digest,
            int(self.correct),
            self.predictions,
            int(self.classes) + int(self.tokens),
        )

    def step_row(self, grad_norm: float, lr: float, input_digest: int = 0) -> StepRow:
        """The sums of one training step, with its gradient norm and learning rate."""
        return StepRow(*self.row()[:4], grad_norm, lr, input_digest)


def mean_loss(rows: Sequence[TallyRow] | Sequence[StepRow]) -> float:
    """The loss summed over ranks, in rank order, divided by the targets they counted."""
    total, count = 0.0, 0
    for row in rows:
        total, count = total + row.loss_sum, count + row.targets
    return total / count if count else math.nan


def step_result(
    rows: Sequence[StepRow], expected: int | None, scale: float | None = None
) -> StepResult:
    """One step from every rank's row. `scale` is fp16's loss scale, else None; under fp16 a norm
    that is not finite means that the step was skipped.

    Raises RunError where ranks disagree on norm or rate (a gradient that was not reduced, a stage
    with a rate of its own), or where the loss did not count the `expected` targets that it was
    divided by.
    """
    _require_agreement("gradient norm", [row.grad_norm for row in rows])
    _require_agreement("learning rate", [row.lr for row in rows])
    counted = sum(row.targets for row in rows)
    if expected is not None and counted != expected:
        raise RunError(
            f"the loss counted {counted} targets where {expected} were expected: a loss must count "
            "integer targets other than -100, others whatever the output"
        )
    digests = [row.digest % 2**64 for row in rows]
    return StepResult(
        loss=mean_loss(rows),
        grad_norm=rows[0].grad_norm,
        lr=rows[0].lr,
        samples=sum(row.samples for row in rows),
        sample_digest=f"{sum(digests) % 2**64:016x}",
        targets=counted,
        loss_scale=scale,
        skipped=scale is not None and not math.isfinite(rows[0].grad_norm),
        digest_by_rank=tuple(
            f"{d:016x}" if row.samples else "" for d, row in zip(digests, rows, strict=True)
        ),
    )


def _require_agreement(what: str, values: Sequence[float]) -> None:
    """RunError where a rank has another value than rank 0."""
    for rank, value in enumerate(values):
        if not math.isclose(value, values[0], rel_tol=RANKS_AGREE) and (
            math.isfinite(value) or math.isfinite(values[0])  # neither: the loop says so
        ):
            raise RunError(
                f"rank {rank} has {what} {value:.9g}, rank 0 has {values[0]:.9g}: "
                "what all ranks share was not reduced over all of them"
            )


def eval_result(mine: TallyRow) -> EvalResult:
    """One evaluation over all ranks from this rank's `Tally.row()`; collective."""
    rows = gather_rows(mine)
    samples, count = sum(row.samples for row in rows), sum(row.targets for row in rows)
    loss, kind = mean_loss(rows), max(row.target_kind for row in rows)
    if not kind:
        return EvalResult(loss, samples, targets=count)
    correct = sum(row.correct for row in rows)
    digest = sum(row.predictions for row in rows) % 2**64
    # Targets that are tokens: e to the mean loss in nats, as language models are judged.
    perplexity = math.exp(min(loss, 700.0)) if kind == 2 else None
    return EvalResult(loss, samples, correct, correct / count, f"{digest:016x}", perplexity, count)
