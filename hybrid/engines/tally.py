"""This module sums up one step or one evaluation. It is the one place where a loss is taken.

Every engine computes its loss through `Tally`, so that sums, counts and sample ids come from the
batch that was really used, without padding."""

import math
from typing import Any, NamedTuple

import numpy
import torch

from ..data.loader import MicroBatch
from ..data.permutation import FIRST, GOLDEN, SECOND
from ..job.errors import RunError
from ..launch.exchange import gather_rows
from ..models.losses import IGNORED_TARGET, Loss
from ..records import EvalResult

_U = numpy.uint64


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

    The data set may tell it. Else integer targets count unless they are -100. For others the loss
    itself is asked, with zeros in place of the output. Engines compare the answer with what the
    loss then really counted."""
    if micro_batch.num_targets is not None:
        return micro_batch.num_targets
    rows = micro_batch.ids.shape[0]
    if rows == 0:
        return 0
    target = real_rows(micro_batch.target, rows, num_rows(micro_batch.target))
    if not target.is_floating_point():
        return int((target != IGNORED_TARGET).sum())
    return int(loss(torch.zeros_like(target), target)[1])


def hash_ids(ids: torch.Tensor, salt: torch.Tensor | None = None) -> int:
    """Sum a hash of each id, or of each (id, salt), modulo 2**64.

    The sum is the same for any order and any split of `ids` (int64 [n]). The hash is splitmix64
    (Steele, Lea and Flood 2014)."""
    z = ids.cpu().numpy().astype(numpy.uint64)
    z *= _U(GOLDEN)
    if salt is not None:
        z += salt.cpu().numpy().astype(numpy.uint64) * _U(0xD1B54A32D192ED03)
    z += _U(1)
    for shift, factor in ((_U(30), _U(FIRST)), (_U(27), _U(SECOND))):
        z ^= z >> shift
        z *= factor
    z ^= z >> _U(31)
    return int(numpy.add.reduce(z))


class TallyRow(NamedTuple):
    """Holds what one rank counted."""

    loss_sum: float
    targets: int
    samples: int
    digest: int
    correct: int
    predictions: int
    target_kind: int  # 1: targets are classes; 2: a sample has several (tokens); 0: others


class Tally:
    """Sums over the micro-batches of one step or one evaluation, on one rank.

    loss_sum: float64 [] on the device. count: the targets counted so far, a tensor [] where the
    loss gives one. Both are None before the first sample."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.loss_sum: torch.Tensor | None = None
        self.count: torch.Tensor | int | None = None
        self.correct: torch.Tensor | int = 0
        self.samples = self.predictions = 0
        self.classes = self.tokens = False
        self._digest = 0
        self._ids: list[torch.Tensor] = []  # not hashed yet

    def add(
        self, loss: Loss, output: Any, micro_batch: MicroBatch, score: bool = False
    ) -> torch.Tensor:
        """Take the loss of one micro-batch and return its sum, with its graph.

        `score` also counts correct classes. A micro-batch of padding alone returns a zero that
        still has a graph."""
        rows, padded = micro_batch.ids.shape[0], num_rows(micro_batch.target)
        if rows == 0:
            first = output[0] if isinstance(output, (tuple, list)) else output
            return first.sum() * 0.0
        output = real_rows(output, rows, padded)
        target = real_rows(micro_batch.target, rows, padded)
        loss_sum, count = loss(output, target)
        exact = loss_sum.detach().to(torch.float64)
        self.loss_sum = exact if self.loss_sum is None else self.loss_sum + exact
        self.count = count if self.count is None else self.count + count
        self.samples += rows
        self._ids.append(micro_batch.ids)
        if score:
            self._score(output, target, micro_batch.ids)
            self.sample_digest()  # an evaluation keeps no list of all its samples
        return loss_sum

    def sample_digest(self) -> int:
        """Return the hash of all samples so far."""
        if self._ids:
            ids = self._ids[0] if len(self._ids) == 1 else torch.cat(self._ids)
            self._digest = (self._digest + hash_ids(ids)) % 2**64
            self._ids = []
        return self._digest

    def _score(self, output: Any, target: Any, ids: torch.Tensor) -> None:
        """Count correct predictions, and hash all of them; only where targets are classes."""
        if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
            return
        if target.is_floating_point() or output.dim() != target.dim() + 1:
            return
        self.classes, self.tokens = True, target.dim() > 1
        predicted = output.argmax(-1)
        self.correct = self.correct + ((predicted == target) & (target != IGNORED_TARGET)).sum()
        flat = predicted.reshape(len(ids), -1)
        places = torch.arange(flat.shape[1], device=flat.device) * 2**32
        mixed = (flat + places).flatten() + 1
        spread = ids.repeat_interleave(flat.shape[1])
        self.predictions = (self.predictions + hash_ids(spread, mixed)) % 2**64

    def row(self) -> TallyRow:
        """Return the sums so far, as numbers."""
        return TallyRow(
            float(self.loss_sum or 0.0),
            int(self.count or 0),
            self.samples,
            self.sample_digest(),
            int(self.correct),
            self.predictions,
            int(self.classes) + int(self.tokens),
        )


def eval_result(mine: TallyRow) -> EvalResult:
    """Make the result of an evaluation from each rank's `Tally.row()`; collective."""
    rows = gather_rows(mine)
    samples, count = sum(row.samples for row in rows), sum(row.targets for row in rows)
    kind = max(row.target_kind for row in rows)
    loss = sum(row.loss_sum for row in rows) / count if count else math.nan
    if not kind:
        return EvalResult(loss, samples, targets=count)
    correct = sum(row.correct for row in rows)
    digest = sum(row.predictions for row in rows) % 2**64
    # For tokens: e to the mean loss in nats, by which language models are compared.
    perplexity = math.exp(min(loss, 700.0)) if kind == 2 else None
    return EvalResult(loss, samples, correct, correct / count, f"{digest:016x}", perplexity, count)
