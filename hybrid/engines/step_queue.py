"""This module carries the numbers of optimizer steps to all ranks while the next step runs.

A rank's numbers are one row of float64. All rows that wait are gathered by one asynchronous
collective when the next step begins, together with the number of targets that the rank has in this
step, where the plan does not tell it (or of samples, where replicas are merged). Nothing waits for
it but who reads it. So all ranks learn, at the same step, that one of them was told to stop."""

import dataclasses
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..launch.stopping import told
from ..launch.waiting import waiting
from .hashes import Samples, hash_together
from .tally import Tally

SEND_EVERY_S = 1.0  # at least, where the state is saved: a rank may have been told to stop
HASHED_TOGETHER = 2**10  # samples in a row at most, whose ids wait until several rows are sent
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
    stop: float = 0.0  # the number of the signal that told this rank to stop; 0: none has
    seconds: float = 0.0  # since the rank noted its last step

    @property
    def digest(self) -> int:
        """Return the digest of the samples whose loss this rank took."""
        return int(self.high) * HALF + int(self.low)

    @property
    def input_digest(self) -> int:
        """Return the digest of the samples whose inputs a pipeline's first stage read."""
        return int(self.input_high) * HALF + int(self.input_low)


@dataclasses.dataclass(slots=True)
class LocalRow:
    """Holds what one row will be made of when it is sent; the fields are those of `StepRow`.

    A small step takes less time than to make its row, so the rows of several are made together."""

    tally: Tally
    expected: int | float
    norm: torch.Tensor | float
    lr: float
    inputs: Samples | None = None  # that a pipeline's stage read
    stop: float = 0.0
    seconds: float = 0.0

    def samples(self) -> list[Samples]:
        """Return what is to be hashed."""
        return [self.tally.seen] if self.inputs is None else [self.tally.seen, self.inputs]

    def late(self) -> list[torch.Tensor | float]:
        """Return the numbers that the device may know late: the first ones of the row."""
        sums = (self.tally.loss_sum, self.tally.count, self.norm)
        return [0.0 if value is None else value for value in sums]

    def known(self) -> list[float]:
        """Return the other ones, which the host knows."""
        digests = self.tally.seen.digest(), self.inputs.digest() if self.inputs else 0
        halves = [half for digest in digests for half in divmod(digest, HALF)]
        return [self.expected, self.tally.samples, *halves, self.lr, self.stop, self.seconds]


def read_rows(rows: Sequence[LocalRow]) -> list[float]:
    """Return the numbers of rows, one after the other, where the device is the host.

    What adds up to one of them is read together with all the others, and added here."""
    hash_together([samples for row in rows for samples in row.samples()])
    numbers = list[Any]()
    places = defaultdict[torch.dtype, list[tuple[int, torch.Tensor]]](list)
    for row in rows:
        first = len(numbers)
        numbers += [0.0, 0.0, 0.0, *row.known()]
        late = [part for pair in row.tally.parts for part in enumerate(pair, first)]
        for i, part in [*late, (first + 2, row.norm)]:
            if isinstance(part, torch.Tensor):
                places[part.dtype].append((i, part))
            else:
                numbers[i] += part
    for alike in places.values():
        values = torch.stack([part for _, part in alike]).tolist()
        for (i, _), value in zip(alike, values, strict=True):
            numbers[i] += value
    return numbers


def send_rows(rows: Sequence[LocalRow], device: torch.device, readable: bool) -> torch.Tensor:
    """Return the numbers of rows, float64 [n], without waiting for the device.
    readable: its tensors can be read without that."""
    if readable:
        return torch.tensor(read_rows(rows), dtype=torch.float64)
    hash_together([samples for row in rows for samples in row.samples()])
    late = torch.stack([_float64(value, device) for row in rows for value in row.late()])
    known = torch.tensor([row.known() for row in rows], dtype=torch.float64)
    if device.type == "cuda":
        known = known.pin_memory().to(device, non_blocking=True)
    return torch.cat((late.view(len(rows), -1), known), 1).view(-1)


@dataclasses.dataclass
class StartedStep:
    """Holds one step whose numbers are not read yet.

    rows: one for each replica in this process. norm_is_whole: each row has the whole norm, not that
    of a part. has_norm: the norm was taken. loss_scale: fp16's, else None. fault: why the guard
    held its update back, None: it did not. samples: those announced of all ranks, None: none."""

    number: int
    rows: list[LocalRow]
    norm_is_whole: bool
    has_norm: bool
    loss_scale: float | None
    fault: str | None = None
    samples: int | None = None


def _float64(value: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


class _Gathering:
    """Is one list of numbers of each rank, on its way to all ranks and to this host.

    rows: this rank's. last: one more number, None: there is none. readable: see `send_rows`."""

    def __init__(
        self,
        rows: list[LocalRow],
        last: int | float | None,
        device: torch.device,
        readable: bool,
    ) -> None:
        self.rows, self.last, self.device = rows, last, device
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.work: Any = None
        if self.size == 1 and device.type == "cpu":
            return  # the numbers are here
        parts = [send_rows(rows, device, readable)] if rows else []
        if last is not None:
            parts.append(torch.full((1,), last, dtype=torch.float64, device=device))
        self.table = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.size > 1:
            mine, self.table = self.table, self.table.new_empty(self.size * len(self.table))
            self.work = dist.all_gather_into_tensor(self.table, mine, async_op=True)
        if device.type == "cuda":
            self.copy = _HostCopy(self.table, self.work)

    def read(self) -> list[list[float]]:
        """Return each rank's numbers, once they are there."""
        if self.size == 1 and self.device.type == "cpu":
            return [[*read_rows(self.rows), *([] if self.last is None else [self.last])]]
        if self.device.type == "cuda":
            with waiting("the numbers of a step"):
                numbers = self.copy.read()
        else:
            self.work.wait()
            numbers = self.table.tolist()
        each = len(numbers) // self.size
        return [numbers[i * each : (i + 1) * each] for i in range(self.size)]


class _HostCopy:
    """Copies a GPU's tensor to the host beside the work that comes after it.

    A plain copy would wait for all that the next step has put on the GPU by then."""

    def __init__(self, tensor: torch.Tensor, work: Any) -> None:
        self.tensor = tensor  # it must live until it is copied
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            if work is not None:
                work.wait()  # this stream waits, the host does not
            self.host.copy_(tensor, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()

    def read(self) -> list[float]:
        """Return the numbers, once they are copied."""
        self.done.synchronize()
        numbers: list[float] = self.host.tolist()
        return numbers


class StepQueue:
    """Holds the steps whose numbers wait to be sent, are on their way, or wait to be read.

    every: they are sent once in so many steps. hurried: and at least once in `SEND_EVERY_S`."""

    def __init__(self, device: torch.device, every: int = 1, hurried: bool = False) -> None:
        self.device, self.every, self.hurried = device, every, hurried
        self.readable = device.type == "cpu"  # tensors, without waiting for the device
        self._pace = math.nan  # seconds of a step by rank 0's clock: the same on all ranks
        self._noted = time.monotonic()
        self.waiting: list[StartedStep] = []
        self.travelling: list[tuple[_Gathering, list[StartedStep]]] = []

    def add(self, step: StartedStep) -> None:
        """Take the numbers of a step."""
        now = time.monotonic()
        for row in step.rows:
            row.stop, row.seconds = float(told()), now - self._noted
            if row.tally.samples > HASHED_TOGETHER:
                hash_together(row.samples())
        self.waiting.append(step)
        self._noted = now

    def is_due(self) -> bool:
        """Tell whether what waits is to be sent; the same on all ranks."""
        seconds = self._pace * (len(self.waiting) + 1)
        return len(self.waiting) >= self.every or (self.hurried and not seconds <= SEND_EVERY_S)

    def send(self, number: int | float | None = None) -> None:
        """Send what waits, and one more number, such as of targets in this step; collective."""
        if self.waiting or number is not None:
            rows = [row for step in self.waiting for row in step.rows]
            gathering = _Gathering(rows, number, self.device, self.readable)
            self.travelling.append((gathering, self.waiting))
            self.waiting = []

    def sent(self) -> list[float]:
        """Return each rank's number that was sent last, once it is there."""
        return [numbers[-1] for numbers in self.travelling[-1][0].read()]

    def take(self) -> Iterator[tuple[StartedStep, list[StepRow]]]:
        """Yield each step that was sent, with the rows of all ranks, in the order of the ranks."""
        travelling, self.travelling = self.travelling, []
        width = len(StepRow._fields)
        for gathering, steps in travelling:
            table, first = gathering.read(), 0
            self._learn_pace(table[0], steps)
            for step in steps:
                last = first + width * len(step.rows)
                starts = range(first, last, width)
                yield step, [StepRow(*rank[i : i + width]) for rank in table for i in starts]
                first = last

    def _learn_pace(self, numbers: Sequence[float], steps: Sequence[StartedStep]) -> None:
        """Take the mean time of these steps by the numbers of rank 0."""
        if steps:
            seconds, first = 0.0, 0
            for step in steps:
                first += len(StepRow._fields) * len(step.rows)
                seconds += numbers[first - 1]
            self._pace = seconds / len(steps)
