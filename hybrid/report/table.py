"""This module builds the table of costs and results, with costs of trusted runs alone.

It has a row for each strategy, with the costs first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..records import Comparison, EvalResult, Memory, Parity, Record, Throughput
from .clean import clean
from .costs import Meaning, find_meaning, format_pace, join_best, tell_sharing
from .excuses import explain_size
from .formats import (
    DASH,
    format_bytes,
    format_diff,
    format_layout,
    format_number,
    format_perplexity,
    format_ratio,
)
from .resumed import format_resumed
from .standing import standings, trusted_runs
from .verdict import verdict

if TYPE_CHECKING:
    from rich.table import Table

IDENTITY = ("strategy", "status")
COSTS = ("speedup", "peak memory", "bytes sent", "step ms")  # after the speed
RESULTS = ("test result", "loss diff", "weight diff")
RESUMED = "resumed"  # after which step; a column where a run was
FLUSH_LEFT = (*IDENTITY, "layout")  # the figures are flush right
LEFT_TO_THE_FILES = ("step ms", "loss diff", "weight diff", RESUMED, "layout")  # so it fits in 80
IN_80_COLUMNS = {"test result": "test"}
TONES = {"good": "bold green", "bad": "bold red", "warning": "bold yellow"}


def make_headers(comparison: Comparison) -> tuple[str, ...]:
    """Return the names of the table's columns."""
    speed = f"{find_meaning(comparison.strategies).unit}/s"
    resumed = (RESUMED,) if any(run.resumed_from for run in comparison.strategies.values()) else ()
    return (*IDENTITY, speed, *COSTS, *RESULTS, *resumed, "layout")


def make_legend(comparison: Comparison) -> str:
    """Explain the columns in sentences."""
    runs = comparison.strategies
    unit, in_steps = find_meaning(runs)
    excused = any(parity.excused for parity in comparison.parity.values() if parity.ok)
    resumed = any(run.resumed_from for run in runs.values())
    perplexity = any(run.eval and run.eval.perplexity is not None for run in runs.values())
    started = "building the engine is left out" if in_steps else "building the engine is part of it"
    sentences = [
        "Speed: by the median step, and by the mean step too where the two are unlike.",
        "Tokens: the targets of a whole batch." if unit == "tokens" else "",
        f"Speedup: the speed divided by that of {comparison.reference}.",
        f"Peak memory: in the first training steps; {started}.",
        "Memory and bytes sent in a step: of the rank that has most.",
        "Test result: perplexity (ppl), e to the mean loss of a target." if perplexity else "",
        _tell_part(comparison),
        "Differences: |a-b|/|b|, the greatest of any step or parameter.",
        "Rounding: how far rounding alone moves it, as controls show." if excused else "",
        "Resumed: after this step the run was interrupted, and went on." if resumed else "",
        "Dash: not measured, or not shown, since only runs proved equal have their costs shown.",
    ]
    return " ".join(filter(None, sentences))


def _tell_part(comparison: Comparison) -> str:
    """Tell of which test samples the results are, where that is a part of them."""
    results = [run.eval for run in comparison.strategies.values() if run.eval]
    parts = {f"{r.samples:,} of {r.set_samples:,}" for r in results if r.set_samples}
    part = "; ".join(sorted(parts))
    return f"Test results are of the first {part} test samples (train.eval_batches)." * bool(part)


def build_rows(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Return a row for each strategy: a text for each of `make_headers`."""
    headers, meaning, rows = make_headers(comparison), find_meaning(comparison.strategies), {}
    trusted = trusted_runs(comparison)
    first = trusted.get(comparison.reference)
    base = meaning.find_rate(first.throughput) if first and first.throughput else None
    for name, standing in standings(comparison).items():
        record, parity = comparison.strategies[name], comparison.parity.get(name)
        shown = name in trusted
        costs = _format_costs(record, meaning, base) if shown else [DASH] * (1 + len(COSTS))
        results = [_format_result(record.eval), *_format_diffs(parity)]
        resumed = [format_resumed(name, record)] if RESUMED in headers else []
        cells = [name, standing.state, *costs, *results, *resumed, format_layout(record.layout)]
        rows[name] = dict(zip(headers, cells, strict=True))
    return rows


def _format_costs(record: Record, meaning: Meaning, base: float | None) -> list[str]:
    pace, memory, comm = record.throughput, record.memory, record.comm
    return [
        format_pace(pace, meaning.unit) if pace else DASH,
        format_ratio(meaning.find_rate(pace) / base) if pace and base else DASH,
        format_bytes(max(meaning.find_peaks(memory))) if memory else DASH,
        format_bytes(max(comm.bytes_per_step)) if comm else DASH,
        _format_step(pace) if pace else DASH,
    ]


def _format_step(pace: Throughput) -> str:
    """Format the median step in milliseconds, and the engine's own part of it."""
    own, whole = pace.engine_s_median, format_number(pace.step_s_median * 1e3)
    return whole if own is None else f"{whole} (engine {format_number(own * 1e3)})"


def _format_diffs(parity: Parity | None) -> list[str]:
    """Format both differences, a large one with the reason why it passed."""
    if parity is None:
        return [DASH, DASH]
    sizes = {"loss": parity.max_loss_diff, "weights": parity.max_weight_diff}
    reasons = {what: explain_size(parity, what, size) for what, size in sizes.items()}
    return [format_diff(s) + (f" ({reasons[w]})" if reasons[w] else "") for w, s in sizes.items()]


def _format_result(result: EvalResult | None) -> str:
    if result is None:
        return DASH
    metrics = "".join(f", {name} {value:.5g}" for name, value in result.metrics.items())
    if result.perplexity is not None:
        return f"ppl {format_perplexity(result.perplexity)}{metrics}"
    if result.accuracy is not None:
        return f"{result.accuracy:.2%}{metrics}"
    return f"loss {result.loss:.5g}{metrics}"


def describe_memory(record: Record) -> dict[str, list[str]]:
    """Return every peak of every rank, which is a cost: it is shown for trusted runs alone."""
    memory = record.memory or Memory([], "")
    steps, started = "in the first training steps", "from building the engine on"
    peaks = {steps: memory.step_peak_bytes, started: memory.peak_bytes}
    if memory.step_peak_bytes == memory.peak_bytes:
        peaks = {f"{steps} and {started}": memory.peak_bytes}
    return {when: list(map(format_bytes, found)) for when, found in peaks.items() if found}


def console_table(comparison: Comparison) -> Table:
    """Return a short table for a terminal, below the verdict and above what that rests on."""
    from rich.table import Table
    from rich.text import Text

    comparison = clean(comparison)
    said = verdict(comparison)
    lines = [*said.details, join_best(comparison), tell_sharing(comparison), *said.notes]
    title, caption = Text(said.headline, TONES[said.tone]), Text("\n".join(filter(None, lines)))
    table = Table(title=title, caption=caption, title_justify="left", box=None, pad_edge=False)
    table.caption_justify = "left"
    shown = [head for head in make_headers(comparison) if head not in LEFT_TO_THE_FILES]
    for head in shown:
        name = IN_80_COLUMNS.get(head, head)
        table.add_column(name, justify="left" if head in FLUSH_LEFT else "right", overflow="fold")
    for row in build_rows(comparison).values():
        table.add_row(*(Text(row[head]) for head in shown))
    return table
