"""The table of results and costs: a row a strategy, without the costs of runs with a problem.

What its columns mean depends on what was measured, and is the same for all runs of a comparison.
"""

from __future__ import annotations

from typing import NamedTuple

from hybrid.records import Comparison, EvalResult, Memory, Record, Throughput
from hybrid.report.formats import (
    DASH,
    format_bytes,
    format_diff,
    format_layout,
    format_number,
    format_perplexity,
)
from hybrid.report.verdict import judge

IDENTITY = ("strategy", "layout", "status")  # flush left, the figures flush right
COSTS = ("step ms", "peak memory", "bytes sent")  # after the speed
UNLIKE_STEPS = 1.2  # a mean step this much longer than the median one deserves a word


class Meaning(NamedTuple):
    """What the figures of a comparison mean: the same in every run, so that they can be compared.
    Speed is in tokens where all runs counted them, else in samples; memory is the peak `in_steps`
    where all runs have that, else from building the engine on."""

    tokens: bool
    in_steps: bool


def find_meaning(comparison: Comparison) -> Meaning:
    """What speed and memory can mean in this comparison."""
    runs = comparison.strategies.values()
    paces = [run.throughput.tokens_per_s for run in runs if run.throughput]
    peaks = [run.memory.step_peak_bytes for run in runs if run.memory]
    return Meaning(bool(paces) and all(paces), bool(peaks) and all(peaks))


def make_headers(comparison: Comparison) -> tuple[str, ...]:
    """The columns of the table."""
    speed = "tokens/s" if find_meaning(comparison).tokens else "samples/s"
    return (*IDENTITY, "loss diff", "weight diff", "test result", speed, *COSTS)


def make_legend(comparison: Comparison) -> str:
    """What the columns mean, in sentences."""
    tokens, in_steps = find_meaning(comparison)
    runs = comparison.strategies.values()
    perplexity = any(run.eval and run.eval.perplexity is not None for run in runs)
    started = "building the engine is left out" if in_steps else "building the engine is part of it"
    sentences = [
        "Differences: |a-b|/|b|, the greatest of any step or parameter.",
        *(["Test result: perplexity (ppl), e to the mean loss of a target."] if perplexity else []),
        "Speed: by the median step, by the mean too where they are unlike.",
        *(["Tokens: the targets of a whole batch."] if tokens else []),
        f"Peak memory: in the first training steps; {started}.",
        "Memory, bytes sent a step: the rank that has most.",
        "Dash: not measured, or not shown, since only runs proved equal have their costs shown.",
    ]
    return " ".join(sentences)


def build_rows(comparison: Comparison) -> dict[str, list[str]]:
    """The table below `make_headers`, a row for each strategy."""
    meaning, rows = find_meaning(comparison), {}
    for name, (state, problem, _) in judge(comparison).items():
        record, parity = comparison.strategies[name], comparison.parity.get(name)
        diffs = (parity.max_loss_diff, parity.max_weight_diff) if parity else (None, None)
        costs = [DASH] * (1 + len(COSTS)) if problem else _costs(record, meaning)
        identity = [name, format_layout(record.layout), state]
        rows[name] = [*identity, *map(format_diff, diffs), _test_result(record.eval), *costs]
    return rows


def _costs(record: Record, meaning: Meaning) -> list[str]:
    pace, memory, comm = record.throughput, record.memory, record.comm
    return [
        format_pace(pace, meaning.tokens) if pace else DASH,
        format_number(pace.step_s_median * 1e3) if pace else DASH,
        format_bytes(max(find_peaks(memory, meaning.in_steps))) if memory else DASH,
        format_bytes(max(comm.bytes_per_step)) if comm else DASH,
    ]


def _test_result(result: EvalResult | None) -> str:
    if result is None:
        return DASH
    if result.perplexity is not None:
        return f"ppl {format_perplexity(result.perplexity)}"
    return f"loss {result.loss:.5g}" if result.accuracy is None else f"{result.accuracy:.2%}"


def find_rate(pace: Throughput, tokens: bool) -> float:
    """Tokens or samples a second, by the median step."""
    return pace.tokens_per_s if tokens and pace.tokens_per_s else pace.samples_per_s


def find_peaks(memory: Memory, in_steps: bool) -> list[int]:
    """The peak of each rank in bytes, in the training steps or from building the engine on."""
    return memory.step_peak_bytes if in_steps else memory.peak_bytes


def describe_memory(record: Record) -> dict[str, list[str]]:
    """Every peak of every rank. A cost: only for runs with nothing against them."""
    memory = record.memory or Memory([], "")
    steps, started = "in the first training steps", "from building the engine on"
    peaks = {steps: memory.step_peak_bytes, started: memory.peak_bytes}
    if memory.step_peak_bytes == memory.peak_bytes:
        peaks = {f"{steps} and {started}": memory.peak_bytes}
    return {when: list(map(format_bytes, found)) for when, found in peaks.items() if found}


def format_pace(pace: Throughput, tokens: bool = False) -> str:
    """Samples or tokens a second by the median step, and by the mean one where they are unlike."""
    ratio, rate = pace.step_s_mean / pace.step_s_median, find_rate(pace, tokens)
    median, mean = format_number(rate), format_number(rate / ratio)
    return f"{median} (mean {mean})" if ratio > UNLIKE_STEPS else median
