"""This module sums up one step or one evaluation. It is the one place where a loss is taken.

Every engine computes its loss through `Tally`, so that sums, counts and sample ids come from the
batch that was really used, without padding."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from ..data.loader import MicroBatch, copied
from ..job.errors import RunError
from ..launch.exchange import gather_rows
from ..models.loss_calls import LossCall, LossCalls
from ..models.losses import Loss, take_loss
from ..models.metrics import Metric, take_metric
from ..records import EvalResult
from .counting import TargetCounter, num_rows, number, real_rows
from .hashes import Samples
from .scores import TOKENS, UNCLEAR, UNKNOWN, Scores

SCALAR = 8  # bytes of a number at most


class TallyRow(NamedTuple):
    """Holds what one rank counted; the last five are those of `Scores`."""

    loss_sum: float
    targets: float  # a float where the loss weighs them
    samples: int
    digest: int
    correct: int
    predictions: int
    kind: int
    scored: int
    entropy: float
    told_apart: int  # 0: the predictions cannot be told apart by sample


class Tally:
    """Sums over the micro-batches of one step or one evaluation, on one rank.

    counter: is shown each output. metrics: of the job, for an evaluation. In training, sums are
    taken when they are asked for: the next stage of a pipeline waits for what comes before that."""

    def __init__(
        self,
        device: torch.device,
        counter: TargetCounter | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self.device, self.counter, self.metrics = device, counter, metrics or {}
        self.parts: list[tuple[torch.Tensor, Any]] = []  # a loss and its count each, to be added
        self.samples = 0
        self.seen = Samples()

    @functools.cached_property
    def scores(self) -> Scores:
        """Return the correct predictions so far."""
        return Scores()

    @functools.cached_property
    def measured(self) -> dict[str, list[Any]]:
        """Return the sum and the count of each metric so far."""
        return {name: [0.0, 0.0] for name in self.metrics}

    def add(
        self,
        loss: Loss,
        output: Any,
        micro_batch: MicroBatch,
        score: bool = False,
        calls: Sequence[LossCall] = (),
    ) -> torch.Tensor:
        """Take the loss of one micro-batch and return its sum, with its graph.

        `score` also counts correct classes and takes the metrics. calls: of torch's losses in the
        forward pass, where the model takes its own. A micro-batch of padding alone returns a zero
        that still has a graph."""
        rows, padded = micro_batch.ids.shape[0], num_rows(micro_batch.target)
        if self.counter:
            self.counter.see(output, micro_batch.target)
        if rows == 0:
            return _zero(loss, output, micro_batch.target)
        output = real_rows(output, rows, padded)
        target = real_rows(micro_batch.target, rows, padded)
        if score:
            with LossCalls() as watched:
                # Metrics take the targets after it, and a loss may change its own.
                own = copied(target) if self.metrics else target
                loss_sum, count = take_loss(loss, output, own)
            self.scores.add([*calls, *watched.calls], target, micro_batch.ids)
            self._measure(output, target)
        else:
            loss_sum, count = take_loss(loss, output, target)
        found = loss_sum.detach()
        if found.untyped_storage().nbytes() > SCALAR:
            found = found.clone()  # which keeps nothing else in memory
        self.parts.append((found, count))
        self.samples += rows
        self.seen.unhashed.append(micro_batch.ids)
        if score:
            self._total()  # an evaluation keeps no list of all its samples
            self.seen.digest()
        return loss_sum

    @property
    def loss_sum(self) -> torch.Tensor | None:
        """Return the sum so far, [] on the device; None before the first sample."""
        return self._total()[0]

    @property
    def count(self) -> torch.Tensor | int | float | None:
        """Return the targets so far, a tensor [] where the loss gives one; None as the sum is."""
        return self._total()[1]

    def _total(self) -> tuple[Any, Any]:
        """Add what has come, in float64 where it is floating, and keep the sums alone."""
        if not self.parts:
            return None, None
        (loss_sum, *losses), (count, *counts) = zip(*self.parts, strict=True)
        total = sum(losses, loss_sum.to(torch.float64)), sum(map(_exact, counts), _exact(count))
        self.parts = [total]
        return total

    def _measure(self, output: Any, target: Any) -> None:
        """Take the job's metrics of one micro-batch."""
        for name, metric in self.metrics.items():
            for i, part in enumerate(take_metric(name, metric, output, target)):
                exact = part.to(torch.float64) if isinstance(part, torch.Tensor) else float(part)
                self.measured[name][i] = self.measured[name][i] + exact

    def row(self) -> TallyRow:
        """Return the sums so far, as numbers."""
        scores = self.scores
        return TallyRow(
            float(self.loss_sum or 0.0),
            float(self.count or 0.0),
            self.samples,
            self.seen.digest(),
            int(scores.correct),
            scores.predictions or 0,
            scores.kind,
            int(scores.scored),
            float(scores.entropy),
            int(scores.predictions is not None),
        )


def _exact(count: Any) -> Any:
    """Return a count in float64 where it is a floating tensor."""
    floating = isinstance(count, torch.Tensor) and count.is_floating_point()
    return count.to(torch.float64) if floating else count


def _zero(loss: Loss, output: Any, target: Any) -> torch.Tensor:
    """Return a zero with the graph that the loss of a row of padding has.

    It is the graph of other ranks' losses: ZeRO-3 waits for ever for a rank that takes gradients of
    other outputs. Where that loss is not finite, the graph reaches all outputs."""
    total = take_loss(loss, output, target)[0]
    if total.isfinite():
        return total * 0.0
    parts = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
    floating = [t for t in parts if t.is_floating_point()]
    graphs = [t for t in floating if t.requires_grad] or floating[:1]
    if not graphs:
        raise RunError("the model's output holds no tensor of floating numbers")
    return sum((t.sum() * 0.0 for t in graphs[1:]), graphs[0].sum() * 0.0)


def eval_result(tally: Tally) -> EvalResult:
    """Make the result of an evaluation from what each rank counted; collective."""
    rows = gather_rows(tally.row())
    samples = sum(row.samples for row in rows)
    count = number(sum(row.targets for row in rows))
    loss = sum(row.loss_sum for row in rows) / count if count else math.nan
    result = EvalResult(loss, samples, targets=count, metrics=_metrics(tally))
    kinds, scored = [row.kind for row in rows], sum(row.scored for row in rows)
    if UNCLEAR in kinds or max(kinds) == UNKNOWN or not scored:
        return result
    correct = sum(row.correct for row in rows)
    digest = sum(row.predictions for row in rows) % 2**64
    entropy = sum(row.entropy for row in rows) / scored
    # For tokens: e to the mean cross-entropy in nats, by which language models are compared.
    tokens = max(kinds) == TOKENS
    return dataclasses.replace(
        result,
        correct=correct,
        accuracy=correct / scored,
        prediction_digest=f"{digest:016x}" if all(row.told_apart for row in rows) else None,
        perplexity=math.exp(min(entropy, 700.0)) if tokens else None,
    )


def _metrics(tally: Tally) -> dict[str, float]:
    """Return each metric's mean over the test sets of all ranks; collective where there are any.

    NaN stands where its counts add up to nothing."""
    if not tally.metrics:
        return {}
    rows = gather_rows([float(x) for pair in tally.measured.values() for x in pair])
    sums = [sum(parts) for parts in zip(*rows, strict=True)]
    return {
        name: total / count if count else math.nan
        for name, total, count in zip(tally.metrics, sums[::2], sums[1::2], strict=True)
    }
