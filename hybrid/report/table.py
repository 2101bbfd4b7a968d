"""This module builds the table of results and costs, with costs of trusted runs alone.

It has a row for each strategy. What a column means depends on what was measured, and is the same
for all runs of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..records import Comparison, EvalResult, Memory, Record, Throughput
from .formats import (
    DASH,
    format_bytes,
    format_diff,
    format_layout,
    format_number,
    format_perplexity,
)
from .verdict import standings, trusted_runs, verdict

if TYPE_CHECKING:
    from rich.table import Table

IDENTITY = ("strategy", "layout", "status")  # flush left, the figures flush right
COSTS = ("step ms", "peak memory", "bytes sent")  # after the speed
LEFT_TO_THE_FILES = ("layout", "weight diff", "step ms")  # so that 80 columns are enough
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


def find_meaning(comparison: Comparison) -> Meaning:
    """Find out what speed and memory can mean in this comparison."""
    runs = comparison.strategies.values()
    paces = [run.throughput.tokens_per_s for run in runs if run.throughput]
    peaks = [run.memory.step_peak_bytes for run in runs if run.memory]
    unit = "tokens" if paces and all(paces) else "samples"
    return Meaning(unit, bool(peaks) and all(peaks))


def make_headers(comparison: Comparison) -> tuple[str, ...]:
    """Return the names of the table's columns."""
    speed = f"{find_meaning(comparison).unit}/s"
    return (*IDENTITY, "loss diff", "weight diff", "test result", speed, *COSTS)


def make_legend(comparison: Comparison) -> str:
    """Explain the columns in sentences."""
    unit, in_steps = find_meaning(comparison)
    runs = comparison.strategies.values()
    perplexity = any(run.eval and run.eval.perplexity is not None for run in runs)
    started = "building the engine is left out" if in_steps else "building the engine is part of it"
    sentences = [
        "Differences: |a-b|/|b|, the greatest of any step or parameter.",
        "Test result: perplexity (ppl), e to the mean loss of a target." if perplexity else "",
        "Speed: by the median step, and by the mean step too where the two are unlike.",
        "Tokens: the targets of a whole batch." if unit == "tokens" else "",
        f"Peak memory: in the first training steps; {started}.",
        "Memory and bytes sent in a step: of the rank that has most.",
        "Dash: not measured, or not shown, since only runs proved equal have their costs shown.",
    ]
    return " ".join(filter(None, sentences))


def build_rows(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Return a row for each strategy: a text for each of `make_headers`."""
    headers, meaning, rows = make_headers(comparison), find_meaning(comparison), {}
    for name, (state, problem, _) in standings(comparison).items():
        record, parity = comparison.strategies[name], comparison.parity.get(name)
        diffs = (parity.max_loss_diff, parity.max_weight_diff) if parity else (None, None)
        results = [*map(format_diff, diffs), _format_result(record.eval)]
        costs = [DASH] * (1 + len(COSTS)) if problem else _format_costs(record, meaning)
        cells = [name, format_layout(record.layout), state, *results, *costs]
        rows[name] = dict(zip(headers, cells, strict=True))
    return rows


def _format_costs(record: Record, meaning: Meaning) -> list[str]:
    pace, memory, comm = record.throughput, record.memory, record.comm
    return [
        format_pace(pace, meaning.unit) if pace else DASH,
        format_number(pace.step_s_median * 1e3) if pace else DASH,
        format_bytes(max(meaning.find_peaks(memory))) if memory else DASH,
        format_bytes(max(comm.bytes_per_step)) if comm else DASH,
    ]


def _format_result(result: EvalResult | None) -> str:
    if result is None:
        return DASH
    if result.perplexity is not None:
        return f"ppl {format_perplexity(result.perplexity)}"
    return f"loss {result.loss:.5g}" if result.accuracy is None else f"{result.accuracy:.2%}"


def format_pace(pace: Throughput, unit: str = "samples") -> str:
    """Format the speed by the median step, and by the mean step where the two are unlike."""
    rate, ratio = Meaning(unit, False).find_rate(pace), pace.step_s_mean / pace.step_s_median
    median, mean = format_number(rate), format_number(rate / ratio)
    return f"{median} (mean {mean})" if ratio > UNLIKE_STEPS else median


def describe_memory(record: Record) -> dict[str, list[str]]:
    """Return every peak of every rank, which is a cost: it is shown for trusted runs alone."""
    memory = record.memory or Memory([], "")
    steps, started = "in the first training steps", "from building the engine on"
    peaks = {steps: memory.step_peak_bytes, started: memory.peak_bytes}
    if memory.step_peak_bytes == memory.peak_bytes:
        peaks = {f"{steps} and {started}": memory.peak_bytes}
    return {when: list(map(format_bytes, found)) for when, found in peaks.items() if found}


def tell_progress(comparison: Comparison) -> dict[str, str]:
    """Tell how the loss went from the first evaluation to the last, for each trusted run."""
    told = {}
    for name, run in trusted_runs(comparison).items():
        if len(run.evals) > 1:
            first, last = run.evals[0], run.evals[-1]
            told[name] = f"validation loss {first.result.loss:#.5g} -> {last.result.loss:#.5g}"
            a, b = first.result.perplexity, last.result.perplexity
            if a is not None and b is not None:
                told[name] += f", perplexity {format_perplexity(a)} -> {format_perplexity(b)}"
            told[name] += f", after {first.step} and {last.step} steps"
    return told


def console_table(comparison: Comparison) -> Table:
    """Return a short table for a terminal, below the verdict and above what that rests on."""
    from rich.table import Table
    from rich.text import Text

    said, progress = verdict(comparison), tell_progress(comparison)
    title = Text(said.headline, "bold green" if said.ok else "bold red")
    caption = Text("\n".join([*said.details, *(f"{n}: {text}." for n, text in progress.items())]))
    table = Table(title=title, caption=caption, title_justify="left", box=None)
    table.caption_justify = "left"
    shown = [head for head in make_headers(comparison) if head not in LEFT_TO_THE_FILES]
    for head in shown:
        table.add_column(head, justify="left" if head in IDENTITY else "right", overflow="fold")
    for row in build_rows(comparison).values():
        table.add_row(*(Text(row[head]) for head in shown))
    return table
