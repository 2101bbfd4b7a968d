"""This module says what the costs of a comparison mean, and which runs cost least.

What a figure means depends on what was measured, and is the same for all runs of a comparison."""

from collections.abc import Mapping
from typing import NamedTuple

from ..records import Best, Comparison, Memory, Record, Throughput
from .formats import count, format_bytes, format_number, format_ratio, group_names
from .standing import trusted_runs

UNLIKE_STEPS = 1.2  # the mean step is shown too where it is this many times the median one


class Meaning(NamedTuple):
    """Says what speed and memory mean in all runs of a comparison, so that they can be compared.

    The `unit` of speed is tokens where all runs counted them, else samples. Memory is the peak of
    the training steps where all runs have that (`in_steps`), else from building the engine on."""

    unit: str
    in_steps: bool

    def find_rate(self, pace: Throughput) -> float:
        """Return tokens or samples per second, by the median step."""
        tokens = pace.tokens_per_s if self.unit == "tokens" else None
        return tokens or pace.samples_per_s

    def find_peaks(self, memory: Memory) -> list[int]:
        """Return the peak memory of each rank in bytes."""
        return memory.step_peak_bytes if self.in_steps else memory.peak_bytes


class Costs(NamedTuple):
    """Holds the costs of runs by their names: units a second, bytes of memory, bytes a step.

    A run is missing where it has no such figure. One process sends nothing, so it is not in
    `sent`."""

    speeds: dict[str, float]
    peaks: dict[str, int]
    sent: dict[str, float]


def find_meaning(runs: Mapping[str, Record]) -> Meaning:
    """Find out what speed and memory can mean in all of these runs."""
    paces = [run.throughput.tokens_per_s for run in runs.values() if run.throughput]
    peaks = [run.memory.step_peak_bytes for run in runs.values() if run.memory]
    unit = "tokens" if paces and all(paces) else "samples"
    return Meaning(unit, bool(peaks) and all(peaks))


def collect_costs(runs: Mapping[str, Record], meaning: Meaning) -> Costs:
    """Collect the figures by which runs can be ranked."""
    return Costs(
        {n: meaning.find_rate(r.throughput) for n, r in runs.items() if r.throughput},
        {n: max(meaning.find_peaks(r.memory)) for n, r in runs.items() if r.memory},
        {n: max(r.comm.bytes_per_step) for n, r in runs.items() if r.comm and r.world_size > 1},
    )


def rank_best(costs: Costs) -> Best:
    """Name the runs that cost least; of equal ones the first."""
    speeds, peaks, sent = costs
    return Best(
        max(speeds, key=lambda name: speeds[name], default=None),
        min(peaks, key=lambda name: peaks[name], default=None),
        min(sent, key=lambda name: sent[name], default=None),
    )


def format_pace(pace: Throughput, unit: str = "samples") -> str:
    """Format the speed by the median step, and by the mean step where the two are unlike."""
    rate, ratio = Meaning(unit, False).find_rate(pace), pace.step_s_mean / pace.step_s_median
    median, mean = format_number(rate), format_number(rate / ratio)
    return f"{median} (mean {mean})" if ratio > UNLIKE_STEPS else median


def tell_best(comparison: Comparison) -> dict[str, str]:
    """Tell which runs cost least, as {'Fastest': 'ddp (5,680 samples/s, 1.72x single)'}.

    Where it is the reference, the best of the other runs is told too."""
    runs, best = trusted_runs(comparison), comparison.best
    meaning = find_meaning(comparison.strategies)
    costs = collect_costs(runs, meaning)
    rest = rank_best(collect_costs(_without(runs, comparison.reference), meaning))
    told = {
        "Fastest": [
            _tell_figure(name, costs.speeds, f" {meaning.unit}/s", comparison.reference)
            for name in _with_rest(best.fastest, rest.fastest, comparison.reference)
        ],
        "Least memory": [
            _tell_figure(name, costs.peaks, "", comparison.reference)
            for name in _with_rest(best.least_memory, rest.least_memory, comparison.reference)
        ],
        "Fewest bytes sent": [_tell_figure(best.fewest_bytes, costs.sent, " a step", "")],
    }
    return {what: ", then ".join(filter(None, texts)) for what, texts in told.items() if any(texts)}


def join_best(comparison: Comparison) -> str:
    """Tell the same in one line; empty where nothing was measured."""
    return " ".join(f"{what}: {text}." for what, text in tell_best(comparison).items())


def _without(runs: Mapping[str, Record], name: str) -> dict[str, Record]:
    return {other: run for other, run in runs.items() if other != name}


def _with_rest(best: str | None, rest: str | None, reference: str) -> list[str | None]:
    return [best, rest] if best == reference else [best]


def _tell_figure(
    name: str | None, figures: Mapping[str, float], unit: str, reference: str
) -> str | None:
    """Tell a run's figure, and its ratio to the reference's where that has one."""
    if name is None or name not in figures:
        return None
    figure = figures[name]
    text = format_number(figure) if unit.endswith("/s") else format_bytes(figure)
    base = figures.get(reference) if name != reference else None
    ratio = f", {format_ratio(figure / base)} {reference}" if base else ""
    return f"{name} ({text}{unit}{ratio})"


def tell_sharing(comparison: Comparison) -> str:
    """Say that processes shared cores, wherever they were more; else return an empty text."""
    cores = comparison.machine.get("cores")
    ranks = max((run.world_size for run in comparison.strategies.values()), default=0)
    if not isinstance(cores, int) or ranks <= cores:
        return ""
    shared = f"{count(ranks, 'process')} shared {count(cores, 'core')}"
    if not any(run.throughput for run in trusted_runs(comparison).values()):
        return f"{shared}."
    return (
        f"{shared}: these speeds say little about a cluster; memory, bytes and equality hold "
        "anywhere."
    )


def tell_processes(comparison: Comparison) -> str:
    """Tell how many processes each run had: 'single on 1 process, the others on 4'."""
    runs = {name: run.world_size for name, run in comparison.strategies.items() if run.world_size}
    sizes = group_names((name, size) for name, size in runs.items())
    own = runs.get(comparison.reference)
    others = {size for name, size in runs.items() if name != comparison.reference}
    if own and len(others) == 1 and others != {own}:
        return f"{comparison.reference} on {count(own, 'process')}, the others on {others.pop()}"
    if len(sizes) == 1:
        return f"each on {count(next(iter(sizes)), 'process')}"
    return ", ".join(f"{names} on {size}" for size, names in sizes.items())
