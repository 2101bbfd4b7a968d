"""This module sums up one step or one evaluation. It is the one place where a loss is taken.

Every engine computes its loss through `Tally`, so that sums, counts and sample ids come from the
batch that was really used, without padding."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from ..data.loader import MicroBatch
from ..job.errors import RunError
from ..launch.exchange import gather_rows
from ..models.loss_calls import LossCall, LossCalls
from ..models.losses import Loss, take_loss
from ..models.metrics import Metric, take_metric
from ..records import EvalResult
from .counting import TargetCounter, num_rows, number, real_rows
from .hashes import hash_each
from .scores import TOKENS, UNCLEAR, UNKNOWN, Scores


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

    counter: is shown each output. metrics: of the job, for an evaluation. loss_sum: [] on the
    device, in float64. count: the targets counted so far, a tensor [] where the loss gives one, in
    float64 where that is floating. Both are None before the first sample."""

    def __init__(
        self,
        device: torch.device,
        counter: TargetCounter | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self.device, self.counter, self.metrics = device, counter, metrics or {}
        self.loss_sum: torch.Tensor | None = None
        self.count: torch.Tensor | int | float | None = None
        self.samples = 0
        self.scores = Scores()
        self.measured: dict[str, list[Any]] = {name: [0.0, 0.0] for name in self.metrics}
        self.digest = 0  # of the samples but `unhashed`
        self.unhashed: list[torch.Tensor] = []  # ids of samples

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
                loss_sum, count = take_loss(loss, output, target)
            self.scores.add([*calls, *watched.calls], target, micro_batch.ids)
            self._measure(output, target)
        else:
            loss_sum, count = take_loss(loss, output, target)
        found = loss_sum.detach()
        if self.loss_sum is None:  # a copy, which keeps nothing else in memory
            self.loss_sum = found.to(torch.float64, copy=True)
        else:
            self.loss_sum = self.loss_sum + found
        if isinstance(count, torch.Tensor) and count.is_floating_point():
            count = count.to(torch.float64)
        self.count = count if self.count is None else self.count + count
        self.samples += rows
        self.unhashed.append(micro_batch.ids)
        if score:
            self.sample_digest()  # an evaluation keeps no list of all its samples
        return loss_sum

    def _measure(self, output: Any, target: Any) -> None:
        """Take the job's metrics of one micro-batch."""
        for name, metric in self.metrics.items():
            for i, part in enumerate(take_metric(name, metric, output, target)):
                exact = part.to(torch.float64) if isinstance(part, torch.Tensor) else float(part)
                self.measured[name][i] = self.measured[name][i] + exact

    def sample_digest(self) -> int:
        """Return the hash of all samples so far."""
        if self.unhashed:
            hash_together([self])
        return self.digest

    def row(self) -> TallyRow:
        """Return the sums so far, as numbers."""
        scores = self.scores
        return TallyRow(
            float(self.loss_sum or 0.0),
            float(self.count or 0.0),
            self.samples,
            self.sample_digest(),
            int(scores.correct),
            scores.predictions or 0,
            scores.kind,
            int(scores.scored),
            float(scores.entropy),
            int(scores.predictions is not None),
        )


def hash_together(tallies: Sequence[Tally]) -> None:
    """Hash the samples of several tallies, for little more than the time of one."""
    parts = [(tally, ids) for tally in tallies for ids in tally.unhashed]
    if parts:
        for (tally, _), digest in zip(parts, hash_each([ids for _, ids in parts]), strict=True):
            tally.digest = (tally.digest + digest) % 2**64
    for tally in tallies:
        tally.unhashed = []


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
