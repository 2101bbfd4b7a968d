"""This module keeps the times of a run's steps, in as much memory for many steps as for few."""

import statistics
from array import array
from collections.abc import Sequence
from typing import NamedTuple

MOST = 2**13  # steps whose times are kept one by one, and numbers of a sample


class Paces(NamedTuple):
    """Holds the seconds of a run's timed steps: means of all, medians of all or of a sample."""

    median: float
    mean: float
    own_median: float
    loading_mean: float


class StepTimes:
    """Takes the seconds of each timed step, in the order in which they are made.

    ahead: steps that other processes load before they are needed. Up to 8,192 steps are kept as
    they are. Then their sums are kept, and of medians an even sample of 4,096 to 8,192 numbers."""

    def __init__(self, ahead: int = 0) -> None:
        self._ahead = ahead
        self._count, self._whole_s, self._loading_s = 0, 0.0, 0.0  # of the steps that are let go
        self._lengths, self._owns = _Sample(), _Sample()
        self._recent = array("d")  # of each step three: whole, own, loading

    def add(self, whole: float, own: float, loading: float) -> None:
        """Take a step: from the end of the one before, the engine's call alone, the loading."""
        self._recent.extend((whole, own, loading))
        if len(self._recent) == 3 * MOST:
            self._let_go()

    def __len__(self) -> int:
        return self._count + len(self._recent) // 3

    def paces(self) -> Paces:
        """Return the means and medians; there must be a step.

        The loading of a step comes in bursts. Where a process loads several steps at once, the mean
        of loading counts. Where others load beside it, it waits in one step and not in the next
        ones, or a slow step hides the loading of others: so many steps as they load ahead count as
        one, of the mean length."""
        recent, count = self._recent, len(self)
        whole, own, loading = (recent[i::3] for i in range(3))
        mean = (self._whole_s + sum(whole)) / count
        loading_mean = (self._loading_s + sum(loading)) / count
        lengths = self._lengths.values_with(self._lengths_of(whole, loading))
        own_median = statistics.median(self._owns.values_with(own))
        median = statistics.median(lengths) if lengths else mean
        return Paces(median + (0 if self._ahead else loading_mean), mean, own_median, loading_mean)

    def _lengths_of(self, whole: Sequence[float], loading: Sequence[float]) -> list[float]:
        """Return what steps, or windows of them, took; without their loading where it is bursts."""
        size = self._ahead
        if not size:
            return [s - part for s, part in zip(whole, loading, strict=True)]
        starts = range(0, len(whole) - size + 1, size)
        return [statistics.fmean(whole[i : i + size]) for i in starts]

    def _let_go(self) -> None:
        """Keep the sums and a sample of the recent steps, and these no more but a part window."""
        steps = MOST - MOST % (self._ahead or 1)
        taken = self._recent[: 3 * steps]
        del self._recent[: 3 * steps]
        whole, own, loading = (taken[i::3] for i in range(3))
        self._count += steps
        self._whole_s += sum(whole)
        self._loading_s += sum(loading)
        self._lengths.extend(self._lengths_of(whole, loading))
        self._owns.extend(own)


class _Sample:
    """Keeps every n-th of many numbers, where n doubles when there would be too many."""

    def __init__(self) -> None:
        self._values = array("d")
        self._every, self._seen = 1, 0

    def extend(self, values: Sequence[float]) -> None:
        for value in values:
            if self._seen % self._every == 0:
                if len(self._values) == MOST:
                    self._values = self._values[::2]
                    self._every *= 2
                self._values.append(value)
            self._seen += 1

    def values_with(self, values: Sequence[float]) -> list[float]:
        """Return the sample with as large a part of more numbers."""
        return [*self._values, *values[:: self._every]]
