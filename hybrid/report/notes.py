"""This module tells what explains the figures of the table, for all runs of a comparison."""

from collections.abc import Mapping

from ..records import Comparison, Record
from .formats import format_perplexity, format_value, group_names
from .standing import trusted_runs


def tell_progress(comparison: Comparison) -> list[str]:
    """Tell how the loss on the test set went from the first evaluation to the last.

    This is of the trusted runs with several evaluations, in one sentence for equal figures."""
    told = {}
    for name, run in trusted_runs(comparison).items():
        if len(run.evals) > 1:
            first, last = run.evals[0], run.evals[-1]
            told[name] = f"{first.result.loss:#.5g} -> {last.result.loss:#.5g}"
            a, b = first.result.perplexity, last.result.perplexity
            if a is not None and b is not None:
                told[name] += f", perplexity {format_perplexity(a)} -> {format_perplexity(b)}"
            told[name] += f", after {first.step} and {last.step} steps"
    groups = group_names(told.items())
    return [f"Validation loss of {names}: {text}." for text, names in groups.items()]


def tell_warnings(runs: Mapping[str, Record]) -> list[str]:
    """Tell what the try-out found before the start, with the runs that it is about."""
    found: dict[str, list[str]] = {}
    for name, run in runs.items():
        for text in run.warnings:
            found.setdefault(text, []).append(name)
    shown = {
        text: "" if len(names) == len(runs) else f" ({', '.join(names)})"
        for text, names in found.items()
    }
    return [f"Tried out before the start: {text}{names}." for text, names in shown.items()]


def tell_skipped(runs: Mapping[str, Record]) -> list[str]:
    """Tell how many steps each run skipped, if any run did."""
    skipped = {name: sum(step.skipped for step in run.steps) for name, run in runs.items()}
    if not any(skipped.values()):
        return []
    shares = group_names((n, f"{skipped[n]} of {len(r.steps)}") for n, r in runs.items() if r.steps)
    parts = [f"{share} under {names}" for share, names in shares.items()]
    return [f"Steps skipped, since gradients overflowed in fp16: {'; '.join(parts)}."]


def tell_variants(comparison: Comparison) -> list[str]:
    """Tell of each variant which strategy it is, and with which settings."""
    sections, told = comparison.job.get("variant") or {}, dict[str, str]()
    for run in comparison.strategies.values():
        if run.variant_of:
            name = run.strategy  # not that of a row which was resumed as a variant
            settings = {k: v for k, v in sections.get(name, {}).items() if k != "strategy"}
            with_them = f" with {format_value(settings)}" if settings else ""
            told[name] = f"{name} is {run.variant_of}{with_them}."
    return [*told.values()]


def tell_references(comparison: Comparison) -> list[str]:
    """Tell which runs are held against a reference of their own, and why."""
    found = {
        name: (parity.reference, parity.reference_because)
        for name, parity in comparison.parity.items()
        if parity.reference_because
    }
    told = []
    for (reference, why), names in group_names(found.items()).items():
        held = "are held" if ", " in names else "is held"
        told.append(
            f"{names} {held} against {reference}, which cuts its batches alike and keeps buffers "
            f"by the same rule: {why}."
        )
    return told
