"""This module sums up one step or one evaluation. It is the one place where a loss is taken.

Every engine computes its loss through `Tally`, so that sums, counts and sample ids come from the
batch that was really used, without padding."""

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

RANKS_AGREE = 1e-6  # relative; all ranks get norms and rates by one all-reduce and equal arithmetic


def real_rows(value: Any, rows: int, padded: int) -> Any:
    """Cut off the rows that pad a micro-batch of `rows` samples to `padded`.
    Raises RunError for a tensor (or one in a tuple or list) that has not one row a sample."""
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
    """Count the rows of a micro-batch's input or target, padding included."""
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value.shape[0]


def count_targets(loss: Loss, micro_batch: MicroBatch) -> int:
    """Count the targets that `loss` will count in a micro-batch, before there is an output.

    Integer targets count unless they are -100. For others the loss itself is asked, with zeros in
    place of the output. Engines compare the answer with what the loss then really counted."""
    rows = len(micro_batch.ids)
    if rows == 0:
        return 0
    target = real_rows(micro_batch.target, rows, num_rows(micro_batch.target))
    if not target.is_floating_point():
        return int((target != IGNORED_TARGET).sum())
    return int(loss(torch.zeros_like(target), target)[1])


def hash_ids(ids: torch.Tensor, salt: int | torch.Tensor = 0) -> int:
    """Sum a hash of each (id, salt) modulo 2**64.

    The sum is the same for any order and any split of `ids` (int64 [n]). The hash is splitmix64
    (Steele, Lea and Flood 2014)."""
    with numpy.errstate(over="ignore"):
        z = ids.cpu().numpy().astype(numpy.uint64) * numpy.uint64(0x9E3779B97F4A7C15)
        more = salt.cpu().numpy() if isinstance(salt, torch.Tensor) else numpy.array(salt)
        z += more.astype(numpy.uint64) * numpy.uint64(0xD1B54A32D192ED03) + numpy.uint64(1)
        z = (z ^ (z >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
        return int((z ^ (z >> numpy.uint64(31))).sum(dtype=numpy.uint64))


class TallyRow(NamedTuple):
    """Holds what one rank counted."""

    loss_sum: float
    targets: int
    samples: int
    digest: int
    correct: int
    predictions: int
    target_kind: int  # 1: targets are classes; 2: a sample has several (tokens); 0: others


class StepRow(NamedTuple):
    """Holds what ranks tell one another after a step."""

    loss_sum: float
    targets: int
    samples: int
    digest: int
    grad_norm: float
    lr: float
    input_digest: int = 0  # of the samples that a pipeline's first stage read


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
        """Take the loss of one micro-batch and return its sum, with its graph.

        `score` also counts correct classes. A micro-batch of padding alone returns a zero that
        still has a graph."""
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
        """Count correct predictions, and hash all of them; only where targets are classes."""
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
        """Return the sums so far, as numbers."""
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
        """Return the sums of one training step, with its gradient norm and learning rate."""
        return StepRow(*self.row()[:4], grad_norm, lr, input_digest)


def mean_loss(rows: Sequence[TallyRow] | Sequence[StepRow]) -> float:
    """Divide the loss summed over ranks, in rank order, by the targets they counted."""
    total, count = 0.0, 0
    for row in rows:
        total, count = total + row.loss_sum, count + row.targets
    return total / count if count else math.nan


def step_result(
    rows: Sequence[StepRow], expected: int | None, scale: float | None = None
) -> StepResult:
    """Make the result of one step from every rank's row.

    `scale` is fp16's loss scale, else None. Under fp16, a norm that is not finite means that the
    step was skipped. Raises RunError if ranks disagree on norm or learning rate (a gradient was not
    reduced, a stage has another rate), or if the loss did not count the `expected` targets that it
    was divided by (None: not checked here)."""
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
    """Raise RunError if a rank has another value than rank 0."""
    for rank, value in enumerate(values):
        if not math.isclose(value, values[0], rel_tol=RANKS_AGREE) and (
            math.isfinite(value) or math.isfinite(values[0])  # else the loop says what is wrong
        ):
            raise RunError(
                f"rank {rank} has {what} {value:.9g}, rank 0 has {values[0]:.9g}: "
                "what all ranks share was not reduced over all of them"
            )


def eval_result(mine: TallyRow) -> EvalResult:
    """Make the result of an evaluation from each rank's `Tally.row()`; collective."""
    rows = gather_rows(mine)
    samples, count = sum(row.samples for row in rows), sum(row.targets for row in rows)
    loss, kind = mean_loss(rows), max(row.target_kind for row in rows)
    if not kind:
        return EvalResult(loss, samples, targets=count)
    correct = sum(row.correct for row in rows)
    digest = sum(row.predictions for row in rows) % 2**64
    # For tokens: e to the mean loss in nats, by which language models are compared.
    perplexity = math.exp(min(loss, 700.0)) if kind == 2 else None
    return EvalResult(loss, samples, correct, correct / count, f"{digest:016x}", perplexity, count)
