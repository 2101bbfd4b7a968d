"""Defines what the doctor says about one thing."""

import dataclasses
from typing import Literal

from ..launch.serialization import sendable

Status = Literal["ok", "warning", "error"]


@sendable
@dataclasses.dataclass(frozen=True)
class Finding:
    """Says what was found, and in `mend` what to do about it (None where there is nothing to do).

    An `error` is something needed that is missing or does not work. A `warning` costs time or gets
    in the way of some runs."""

    name: str
    status: Status
    found: str
    mend: str | None = None


@sendable
@dataclasses.dataclass(frozen=True)
class Link:
    """Describes the way between two ranks; the latency is that of 8 bytes."""

    ranks: tuple[int, int]
    hosts: tuple[str, str]
    latency_s: float
    bytes_per_s: float


def warn_if(wrong: bool, name: str, found: str, mend: str) -> Finding:
    """Return a warning with its remedy where something is wrong, and an `ok` otherwise."""
    return Finding(name, "warning", found, mend) if wrong else Finding(name, "ok", found)


def count(number: int, word: str) -> str:
    """Write a number with its noun, such as `1 process` or `2 machines`."""
    return f"{number} {word}{'' if number == 1 else 'es' if word.endswith('s') else 's'}"
