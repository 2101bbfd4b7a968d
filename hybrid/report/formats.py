"""This module formats numbers, sizes and JSON values for readers, always as plain text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DASH = "\N{EM DASH}"


def format_diff(value: float | None) -> str:
    """Format a relative difference: 0, 3.1e-7."""
    return DASH if value is None else f"{value:.2g}".replace("e-0", "e-")


def format_number(value: float) -> str:
    """Format with three digits or, from 100 on, with all whole digits: 0.0123, 2.30, 12,345."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def format_ratio(value: float) -> str:
    """Format how many times as large something is, with two digits below 1: 0.29x, 2.35x, 12.3x."""
    return f"{value:.2g}x" if value < 0.995 else f"{format_number(value)}x"


def format_bytes(value: float) -> str:
    """Format a size in binary units: 512 B, 1.23 MiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{format_number(value)} {units[0]}"


def format_perplexity(value: float) -> str:
    """Format like `format_number`, but with an exponent from 1e6 on, for losses that diverged."""
    return format_number(value) if value < 1e6 else f"{value:.2e}"


def format_layout(layout: Mapping[str, int]) -> str:
    """List the axes longer than 1, as 'pp 2, dp 2', without a `replicate` that equals `dp`."""
    again = layout.get("replicate") == layout.get("dp")
    axes = [a for a, n in layout.items() if n > 1 and not (again and a == "replicate")]
    return ", ".join(f"{axis} {layout[axis]}" for axis in axes) or DASH


def format_value(value: Any) -> str:
    """Write any JSON value on one line; of a long list, show the start and the length."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        more = [f"\N{HORIZONTAL ELLIPSIS} {len(value)} in all"] if len(value) > 6 else []
        return f"({', '.join([*map(format_value, value[:6]), *more])})" if value else "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.6g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def join_words(words: Sequence[str]) -> str:
    """Join words as a sentence lists them: 'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def count(number: int, noun: str) -> str:
    """Write a number with its noun: '1 step', '2,000 steps', '3 processes'."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def group_names(pairs: Iterable[tuple[str, Any]]) -> dict[Any, str]:
    """Join the names that share a key, as {key: 'ddp, fsdp'}, in the order of the pairs."""
    names: dict[Any, list[str]] = {}
    for name, key in pairs:
        names.setdefault(key, []).append(name)
    return {key: ", ".join(found) for key, found in names.items()}


def format_count(value: float) -> str:
    """Format with three digits and a unit of thousands: 950, 41.2k, 1.30M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:
            return f"{format_number(value / factor)}{unit}"
    return format_number(value)


def format_time(seconds: float) -> str:
    """Format a length of time: 42s, 3m05s, 1h04m, 2d03h."""
    whole = round(seconds)
    for large, small, units in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= large:
            return f"{whole // large}{units[0]}{whole % large // small:02}{units[1]}"
    return f"{whole}s" if seconds >= 9.95 else f"{seconds:.1f}s"
