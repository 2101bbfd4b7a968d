"""This module carries the numbers of optimizer steps to all ranks while the next step runs.

A rank's numbers are one row of float64. All rows that wait are gathered by one asynchronous
collective when the next step begins, together with the number of targets that the rank has in this
step, where the plan does not tell it. Nothing waits for it but who reads it."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..job.errors import RunError
from .protocol import StepResult
from .tally import Tally, mean_loss

RANKS_AGREE = 1e-6  # relative; all ranks get norms and rates by one all-reduce and equal arithmetic
HALF = 2**32  # float64 holds a 64-bit digest as two halves


class StepRow(NamedTuple):
    """Holds what one rank (or one emulated replica) tells the others of a step."""

    loss_sum: float
    targets: float  # that the loss counted
    norm: float  # of the gradients, or of this rank's part of them; nan: not taken
    expected: float  # targets, by which the losses were divided
    samples: float
    high: float  # the two halves of the digest of the samples
    low: float
    input_high: float  # and of those that a pipeline's first stage read
    input_low: float
    lr: float

    @property
    def digest(self) -> int:
        """Return the digest of the samples whose loss this rank took."""
        return int(self.high) * HALF + int(self.low)

    @property
    def input_digest(self) -> int:
        """Return the digest of the samples whose inputs a pipeline's first stage read."""
        return int(self.input_high) * HALF + int(self.input_low)


@dataclasses.dataclass
class StartedStep:
    """Holds one step whose numbers are not read yet.

    rows: float64 [replicas in this process, numbers of `StepRow`]. norm_is_whole: each row has the
    whole norm, not that of a part. has_norm: the norm was taken. loss_scale: fp16's, else
    None."""

    number: int
    rows: torch.Tensor
    norm_is_whole: bool
    has_norm: bool
    loss_scale: float | None


def make_row(
    tally: Tally, expected: int, norm: torch.Tensor | float, lr: float, input_digest: int = 0
) -> torch.Tensor:
    """Return one rank's numbers of a step, float64 [numbers], without waiting for a device.

    The arguments are those of `StepRow`."""
    digest = tally.sample_digest()
    halves = (digest // HALF, digest % HALF, input_digest // HALF, input_digest % HALF)
    host = torch.tensor((expected, tally.samples, *halves, lr), dtype=torch.float64)
    if tally.device.type == "cuda":
        host = host.pin_memory().to(tally.device, non_blocking=True)
    late = [_float64(x, tally.device) for x in (tally.loss_sum, tally.count, norm)]
    return torch.cat((torch.stack(late), host))


def _float64(value: torch.Tensor | float | None, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to(torch.float64)
    return torch.full((), value or 0, dtype=torch.float64, device=device)


class _Gathering:
    """Is a tensor of each rank on its way to all ranks."""

    def __init__(self, mine: torch.Tensor) -> None:
        self.work, self.table = None, mine.unsqueeze(0)
        if dist.is_initialized() and (size := dist.get_world_size()) > 1:
            table = mine.new_empty((size * len(mine), *mine.shape[1:]))
            self.work = dist.all_gather_into_tensor(table, mine, async_op=True)
            self.table = table.view(size, *mine.shape)
        self._read: list[list[list[float]]] | None = None

    def read(self) -> list[list[list[float]]]:
        """Return each rank's rows, once they are there."""
        if self._read is None:
            if self.work is not None:
                self.work.wait()
            self._read = self.table.tolist()
        return self._read


class StepQueue:
    """Holds the steps whose numbers wait to be sent, are on their way, or wait to be read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waiting: list[StartedStep] = []
        self.travelling: list[tuple[_Gathering, list[StartedStep]]] = []

    def add(self, step: StartedStep) -> None:
        """Take the numbers of a step."""
        self.waiting.append(step)

    def send(self, count: int | None = None) -> None:
        """Send what waits, and this rank's number of targets in the coming step; collective."""
        rows = [step.rows for step in self.waiting]
        if count is not None:
            width = len(StepRow._fields)
            rows.append(torch.full((1, width), count, dtype=torch.float64, device=self.device))
        if rows:
            self.travelling.append((_Gathering(torch.cat(rows)), self.waiting))
            self.waiting = []

    def count(self) -> int:
        """Return the sum over the ranks of the counts that were sent last."""
        return sum(int(rows[-1][0]) for rows in self.travelling[-1][0].read())

    def take(self) -> Iterator[tuple[StartedStep, list[StepRow]]]:
        """Yield each step that was sent, with the rows of all ranks, in the order of the ranks."""
        travelling, self.travelling = self.travelling, []
        for gathering, steps in travelling:
            table, first = gathering.read(), 0
            for step in steps:
                last = first + len(step.rows)
                yield step, [StepRow(*row) for rank in table for row in rank[first:last]]
                first = last


def norms_of(
    step: StartedStep, rows: Sequence[StepRow], parts: Sequence[Sequence[int]]
) -> list[float]:
    """Return the gradients' norm as each rank, or each group of ranks in `parts`, knows it.

    parts: the ranks whose squares add up to the whole, where a row has only a part."""
    if step.norm_is_whole:
        return [row.norm for row in rows]
    return [math.sqrt(sum(rows[i].norm ** 2 for i in group)) for group in parts]


def step_result(step: StartedStep, rows: Sequence[StepRow], norms: Sequence[float]) -> StepResult:
    """Make the result of one step from every rank's row, and from the norm as each knows it.

    Under fp16, a norm that is not finite means that the step was skipped. Raises RunError if ranks
    disagree on norm or learning rate (a gradient was not reduced, a stage has another rate), or if
    the loss did not count the targets that it was divided by."""
    _require_agreement("gradient norm", norms)
    _require_agreement("learning rate", [row.lr for row in rows])
    for rank, row in enumerate(rows):
        if row.targets != row.expected:
            raise RunError(
                f"rank {rank}: the loss counted {row.targets:.0f} targets where {row.expected:.0f} "
                "were expected: a loss must count integer targets other than -100, others whatever "
                "the output"
            )
    return StepResult(
        loss=mean_loss([row.loss_sum for row in rows], [row.targets for row in rows]),
        grad_norm=norms[0] if step.has_norm else None,
        lr=rows[0].lr,
        samples=int(sum(row.samples for row in rows)),
        sample_digest=f"{sum(row.digest for row in rows) % 2**64:016x}",
        targets=int(sum(row.targets for row in rows)),
        loss_scale=step.loss_scale,
        skipped=step.loss_scale is not None and not math.isfinite(norms[0]),
        digest_by_rank=tuple(f"{row.digest:016x}" if row.samples else "" for row in rows),
    )


def _require_agreement(what: str, values: Sequence[float]) -> None:
    """Raise RunError if a rank, or a group of ranks, has another value than the first."""
    for rank, value in enumerate(values):
        if not math.isclose(value, values[0], rel_tol=RANKS_AGREE) and (
            math.isfinite(value) or math.isfinite(values[0])  # else the loop says what is wrong
        ):
            raise RunError(
                f"rank {rank} has {what} {value:.9g}, rank 0 has {values[0]:.9g}: "
                "what all ranks share was not reduced over all of them"
            )
