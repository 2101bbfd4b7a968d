"""Decides which steps of a run are timed, and in which ones memory and traffic are measured.

Counting slows a step, so counted steps are not timed. In the first steps the memory meter and the
collective counter run, for as many steps as the communication takes to repeat; the steps after them
are timed. A run too short for that counts collectives in every step and times all but the warm-up.
A step lasts from the end of the step before to its own end, so that the loading of its batch, the
reading of numbers and the writing of records are in it. After an evaluation, a checkpoint or a step
that was not timed it begins with the loading. What the engine's own call takes is noted beside it.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..launch.exchange import gather_objects
from ..records import Comm, Memory, Throughput
from .memory import StorageMeter
from .step_times import StepTimes
from .traffic import CollectiveCounter, tcp_bytes_sent

if TYPE_CHECKING:
    from .traffic import OpCount


WARMUP_STEPS = 2  # the first allocates optimizer state and rebuilds DDP's buckets
FEWEST_TIMED = 3
_NOTHING = contextlib.nullcontext()


Moment = Any  # by the host's clock, seconds; on a GPU an event, which the device passes


def _pass_event() -> Moment:
    """Return the moment at which the device gets here; the host does not wait for it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _device_seconds(start: Moment, end: Moment) -> float:
    """Return the seconds between two events, once the device has passed the second."""
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _host_seconds(start: Moment, end: Moment) -> float:
    return end - start


class StepCost(NamedTuple):
    """Holds when one step and the loading of its batch began and ended on this rank.

    begun: where the step before has ended, or the loading has begun. memory_bytes: the peak so far,
    None: not measured."""

    begun: Moment
    loading: Moment
    loaded: Moment
    taken: Moment  # the engine's call begins
    done: Moment
    timed: bool  # it counts for the speed
    memory_bytes: int | None


class Instruments:
    """Holds the memory meter, the collective counter and the clock of one run.

    period: the communication repeats after so many steps. compiled: torch.compile compiles the
    layers. It never does so again once it has met the meter's dispatch mode, so on a CPU the memory
    of such a run is not measured. ahead: steps that other processes load before they are needed.
    These are not timed where enough others follow, since they were loaded in the slow steps."""

    def __init__(
        self,
        steps: int,
        period: int,
        device: torch.device,
        compiled: bool = False,
        ahead: int = 0,
    ) -> None:
        self.device, self.blind = device, compiled and device.type == "cpu"
        self.meter, self.counter = StorageMeter(device), CollectiveCounter()
        first = WARMUP_STEPS
        # torch.compile compiles once more when the collective counter is removed.
        settled = first + period + compiled
        if steps >= settled + FEWEST_TIMED:
            self.metered, self.counted = range(first + period), range(first, first + period)
            self.timed = range(min(settled + ahead, steps - FEWEST_TIMED), steps)
        else:
            self.metered, self.counted = range(first), range(steps)
            self.timed = range(first if steps > first else 0, steps)
        self._times = StepTimes(ahead)
        on_device = device.type == "cuda"
        self._now: Callable[[], Moment] = _pass_event if on_device else time.perf_counter
        self._seconds = _device_seconds if on_device else _host_seconds
        now = self._now()
        self._begun = self._loading = self._loaded = now
        self._goes_on = False  # the coming step begins where the one before has ended
        self.last_step = StepCost(now, now, now, now, now, False, None)
        self._tcp: list[int | None] = []

    def begin_loading(self) -> None:
        """Begin the time in which this process waits for the batch of the step that comes next.

        On a GPU it is the time for which the device waits: none while earlier steps keep it busy.
        """
        self._loading = self._now()
        self._begun = self.last_step.done if self._goes_on else self._loading

    def end_loading(self) -> None:
        """End the time of loading."""
        self._loaded = self._now()

    def interrupt(self) -> None:
        """Say that what has come since the last step is no part of the coming one."""
        self._goes_on = False

    def step(self, step: int, make: Callable[[], None]) -> None:
        """Make one optimizer step with the instruments that are due, and the clock."""
        if step == 0:
            self.meter.mark()
        if step == self.counted.start:
            self._tcp.append(tcp_bytes_sent())
            self.counter.start()
        with self.meter if step in self.metered and not self.blind else _NOTHING:
            taken = self._now()
            make()
            done = self._now()
        self._goes_on = timed = step in self.timed
        memory = None if self.blind else self.meter.peak_bytes
        begun = self._begun, self._loading, self._loaded
        self.last_step = StepCost(*begun, taken, done, timed, memory)
        if step == self.counted.stop - 1:
            self.counter.stop()
            self._tcp.append(tcp_bytes_sent())

    def close(self) -> None:
        """Remove the counting kernels, which a failed run leaves in place for the whole process."""
        self.counter.close()

    def read(self, cost: StepCost) -> dict[str, float | None]:
        """Return what a step took on this rank, as a line of `steps.jsonl` has it.

        `seconds` is the whole step, `engine_s` the engine's call in it, `loading_s` the loading."""
        own, whole = self._seconds(cost.taken, cost.done), self._seconds(cost.begun, cost.done)
        loading_s = self._seconds(cost.loading, cost.loaded)
        if cost.timed:
            self._times.add(whole, own, loading_s)
        return {
            "seconds": whole,
            "engine_s": own,
            "loading_s": loading_s,
            "memory_bytes": cost.memory_bytes,
        }

    def throughput(self, samples_per_step: int, tokens_per_step: float | None) -> Throughput | None:
        """Return the speed over the timed steps; None where no step was timed."""
        if not self._times:
            return None
        paces = self._times.paces()
        return Throughput(
            samples_per_s=samples_per_step / paces.median,
            step_s_median=paces.median,
            step_s_mean=paces.mean,
            timed_steps=len(self._times),
            tokens_per_s=tokens_per_step / paces.median if tokens_per_step else None,
            loading_s_mean=paces.loading_mean,
            engine_s_median=paces.own_median,
        )

    def memory(self) -> Memory | None:
        """Return the peaks of all ranks, or None where they were not measured; collective."""
        if self.blind:
            return None
        peaks = self.meter.peak_bytes, self.meter.peak_bytes_since_mark
        whole, steps = zip(*gather_objects(peaks), strict=True)
        return Memory(list(whole), self.meter.how, list(steps))

    def reduced_in(self) -> str | None:
        """Return torch's name of the dtype in which most bytes were summed over ranks.

        These are the gradients' bytes, since the loop itself sums only a few numbers in a step.
        Returns None where nothing was summed."""
        found = Counter[str]()
        for name in ("all_reduce", "reduce_scatter"):
            found.update(self.counter.payload_by_dtype().get(name, {}))
        return found.most_common(1)[0][0] if found else None

    def comm(self) -> Comm:
        """Return the calls and bytes of all ranks in each counted step, on average; collective."""
        steps = max(1, len(self.counted))
        by_rank: list[dict[str, OpCount]] = gather_objects(self.counter.counts())
        names = sorted({name for counts in by_rank for name in counts})
        by_op = {
            name: {
                what: [getattr(c[name], what) / steps if name in c else 0.0 for c in by_rank]
                for what in ("calls", "payload_bytes", "sent_bytes")
            }
            for name in names
        }
        sent = [sum(c.sent_bytes for c in counts.values()) / steps for counts in by_rank]
        tcp = gather_objects(self._tcp)
        known = all(len(t) == 2 and None not in t for t in tcp)
        wire = [(t[1] - t[0]) / steps for t in tcp] if known else None
        unknown = {name for names in gather_objects(self.counter.not_counted()) for name in names}
        return Comm(sent, by_op, len(self.counted), wire, sorted(unknown))
