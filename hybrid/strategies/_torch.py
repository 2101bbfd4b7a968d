"""What engines share in plain torch: the one place where a loss is taken, and weights.

`Tally` is where every engine computes its loss, so that sums, counts and sample ids come from the
batch that was really used, padding left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import nn

from ..config import JobError
from ..data.batches import MicroBatch
from ..models.losses import IGNORED_TARGET, Loss
from ..processes import gather_rows
from ..records import EvalResult
from ._precision import names_of, plain_name
from .base import RunError, StepResult

RANKS_AGREE = 1e-6  # relative; norms and rates come out of one all-reduce and the same arithmetic


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple, list or dict of them, on `device`."""
    if isinstance(value, Mapping):
        return {key: to_device(v, device) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(v, device) for v in value)
    return value.to(device, non_blocking=True)


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

    def row(self) -> list[int | float]:
        """What ranks exchange: loss sum, count, samples, digest, correct, predictions, and whether
        targets are classes (1), and several a sample (2)."""
        return [
            self.loss_sum.item(),
            int(self.count),
            self.samples,
            self.digest,
            int(self.correct),
            self.predictions,
            int(self.classes) + int(self.tokens),
        ]


def mean_loss(rows: Sequence[Sequence[int | float]]) -> float:
    """Loss summed over ranks, in rank order, over the targets they counted."""
    total = 0.0
    for row in rows:
        total += row[0]
    count = sum(int(row[1]) for row in rows)
    return total / count if count else float("nan")


def step_result(
    rows: Sequence[Sequence[int | float]], expected: int | None, scale: float | None = None
) -> StepResult:
    """One step from every rank's `[*Tally.row(), grad_norm, lr]`; `scale`: fp16's, else None. Under
    fp16 a norm that is not finite means that the step was skipped.

    RunError where ranks disagree on norm or rate (a gradient that was not reduced, a stage with a
    rate of its own) or the loss did not count the `expected` targets that it was divided by.
    """
    for what, column in (("gradient norm", -2), ("learning rate", -1)):
        values = [float(row[column]) for row in rows]
        for rank, value in enumerate(values):
            if not math.isclose(value, values[0], rel_tol=RANKS_AGREE) and (
                math.isfinite(value) or math.isfinite(values[0])  # none: the loop says so
            ):
                raise RunError(
                    f"rank {rank} has {what} {value:.9g}, rank 0 has {values[0]:.9g}: "
                    "what all ranks share was not reduced over all of them"
                )
    counted = sum(int(row[1]) for row in rows)
    if expected is not None and counted != expected:
        raise RunError(
            f"the loss counted {counted} targets where {expected} were expected: a loss must count "
            "integer targets other than -100, others whatever the output"
        )
    digests = [int(row[3]) % 2**64 for row in rows]
    return StepResult(
        loss=mean_loss(rows),
        grad_norm=float(rows[0][-2]),
        lr=float(rows[0][-1]),
        samples=sum(int(row[2]) for row in rows),
        sample_digest=f"{sum(digests) % 2**64:016x}",
        targets=counted,
        loss_scale=scale,
        skipped=scale is not None and not math.isfinite(rows[0][-2]),
        digest_by_rank=tuple(
            f"{d:016x}" if row[2] else "" for d, row in zip(digests, rows, strict=True)
        ),
    )


def eval_result(tally_row: Sequence[int | float]) -> EvalResult:
    """One evaluation over all ranks from this rank's `Tally.row()`; collective."""
    rows = gather_rows(tally_row)
    samples, correct = (sum(int(row[i]) for row in rows) for i in (2, 4))
    count = sum(int(row[1]) for row in rows)
    loss = mean_loss(rows)
    if not any(row[6] for row in rows):
        return EvalResult(loss, samples, targets=count)
    digest = sum(int(row[5]) for row in rows) % 2**64
    # Targets that are tokens: e to the mean loss in nats, as language models are judged.
    perplexity = math.exp(min(loss, 700.0)) if any(row[6] == 2 for row in rows) else None
    return EvalResult(loss, samples, correct, correct / count, f"{digest:016x}", perplexity, count)


def gradient_dtypes(model: nn.Module) -> str:
    """What the gradients that a model holds are stored in."""
    return names_of(p.grad for p in model.parameters() if p.grad is not None)


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model, by canonical name."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {plain_name(name): tensor for name, tensor in found.items()}


def num_held(model: nn.Module) -> int:
    """How many trained parameters of a live model this rank holds; of a sharded one, its shard."""
    held = 0
    for p in model.parameters():
        if p.requires_grad:
            local = p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p)
            held += local.numel()
    return held


def copy_of_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model that is whole on this rank, copied to the CPU."""
    return {name: t.detach().cpu().clone() for name, t in named_tensors(model).items()}


def copy_state(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy `state` into `tensors` of the same names; JobError where names or shapes differ."""
    if tensors.keys() != state.keys():
        raise JobError(f"the state's tensors are not the model's: {sorted(tensors ^ state.keys())}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape:
                raise JobError(
                    f"{name}: the state has shape {list(state[name].shape)}, "
                    f"the model {list(tensor.shape)}"
                )
            tensor.copy_(state[name])
