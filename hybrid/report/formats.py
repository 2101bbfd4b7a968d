"""Numbers, sizes and any JSON value as a reader wants them. All text is plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DASH = "\N{EM DASH}"


def format_diff(value: float | None) -> str:
    """A relative difference: 0, 3.1e-7."""
    return DASH if value is None else f"{value:.2g}".replace("e-0", "e-")


def format_number(value: float) -> str:
    """Three digits or, from 100 on, all of the whole ones: 0.0123, 2.30, 12,345."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def format_bytes(value: float) -> str:
    """A size in binary units: 512 B, 1.23 MiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{format_number(value)} {units[0]}"


def format_perplexity(value: float) -> str:
    """Like `format_number`, but 1e6 and more with an exponent: e to a bad loss has many digits."""
    return format_number(value) if value < 1e6 else f"{value:.2e}"


def format_layout(layout: Mapping[str, int]) -> str:
    """The axes longer than 1: 'pp 2, dp 2'. `replicate` that is just `dp` is left out."""
    again = layout.get("replicate") == layout.get("dp")
    axes = [a for a, n in layout.items() if n > 1 and not (again and a == "replicate")]
    return ", ".join(f"{axis} {layout[axis]}" for axis in axes) or DASH


def format_value(value: Any) -> str:
    """Any JSON value on one line; long lists are cut and say how long they are."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        more = [f"\N{HORIZONTAL ELLIPSIS} {len(value)} in all"] if len(value) > 6 else []
        return f"({', '.join([*map(format_value, value[:6]), *more])})"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.6g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
