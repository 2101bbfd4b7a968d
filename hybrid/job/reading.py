"""Reads files that people write, and says in one line what is wrong with one."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from .errors import JobError

MAX_BYTES = 2**24  # people write some thousands; weights named by mistake are more


def read_text(path: Path, what: str, max_bytes: int = MAX_BYTES) -> str:
    """The text of a file; `what` names it in errors. JobError where it is no regular file (a pipe
    or a device could be waited for without end), holds more than `max_bytes` or is not UTF-8. A
    byte order mark in front, which some editors write, is no part of the text."""
    problem, content = None, b""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                content = file.read(max_bytes + 1)
        else:
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
            problem = f"is {kind}, not a file"
    except OSError as error:
        problem = error.strerror
    except ValueError as error:  # a NUL in its name
        problem = str(error)
    if len(content) > max_bytes:
        problem = f"holds more than {max_bytes >> 10} KiB"
    if problem:
        raise JobError(f"{what}: cannot be read: {problem}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is {content[error.start]:#04x}"
        raise JobError(f"{what}: is not text in UTF-8: {at}") from None


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds; JobError where `read_text` raises it, where it is not JSON, holds a
    key twice (a parser would drop one in silence) or a number that JSON does not have."""
    text = read_text(path, what)
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise JobError(f"{what}: not a JSON file: nested too deeply") from None
    except ValueError as error:
        raise JobError(f"{what}: not a JSON file: {str(error).splitlines()[0]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{show(key)} stands twice in one object")
        found[key] = value
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(show_key(text))


def show(value: Any) -> str:
    """A value as Python writes it, on one line, at most 60 characters of it."""
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):  # thousands of digits, hundreds of levels
        return f"a {type(value).__name__} too large to show"


def show_key(key: str) -> str:
    """A key on one line, at most 60 characters of it."""
    return _cut(repr(key)[1:-1])


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
