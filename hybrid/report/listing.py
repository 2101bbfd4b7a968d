"""This module lists the strategies and what each accepts. It needs no torch."""

from typing import Any

from ..job.strategy_settings import Strategies
from ..strategies import registry


def table() -> dict[str, dict[str, Any]]:
    """Return the summary and the settings, with their defaults, of each strategy by its name."""
    found = {}
    for name in registry.NAMES:
        section = Strategies.model_fields["two_d" if name == "2d" else name].default
        settings = {key: getattr(section, key) for key in type(section).model_fields}
        found[name] = {"summary": registry.get(name).summary, "settings": settings}
    return found


def lines() -> list[str]:
    """Return the same as lines for a terminal, two for each strategy."""
    found = []
    for name, row in table().items():
        accepts = ", ".join(f"{key} = {value!r}" for key, value in row["settings"].items())
        found += [f"{name:10} {row['summary']}", f"{'':10} [strategy.{name}] {accepts}"]
    return found
