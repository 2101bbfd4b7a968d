"""This module reads files that people write, and says in one line what is wrong with one."""

import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import JobError, first_line

MAX_BYTES = 2**24  # people write some thousands; a file of weights, named by mistake, holds more


def read_text(path: Path, what: str, max_bytes: int = MAX_BYTES) -> str:
    """Return the text of a file without a byte order mark, which some editors write in front.

    `what` names the file in errors. Raises JobError where it is no regular file (one could wait for
    ever for a pipe or a device), holds more than `max_bytes` or is not UTF-8."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise ValueError(f"is {kind}, not a file")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise ValueError(f"holds more than {max_bytes >> 10} KiB")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start} is {content[error.start]:#04x}"
        raise JobError(f"{what}: is not text in UTF-8: {at}") from None
    except (OSError, ValueError) as error:  # ValueError is also raised for a NUL in a name
        problem = error.strerror if isinstance(error, OSError) else error
        raise JobError(f"{what}: cannot be read: {problem}") from None


def require_plain(path: Path, max_bytes: int | None = None) -> None:
    """Raise JobError where a file that is there is a pipe, a device or a folder, or is too long.

    One could wait for ever for what is in a pipe or a device, and a library would."""
    what = show_key(path.name)
    try:
        found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise JobError(f"{what}: is a link to what is not there") from None
        return
    except (OSError, ValueError) as error:  # such as a loop of links, or a NUL in the name
        problem = error.strerror if isinstance(error, OSError) else error
        raise JobError(f"{what}: cannot be read: {problem}") from None
    if not stat.S_ISREG(found.st_mode):
        raise JobError(f"{what}: is no regular file")
    if max_bytes is not None and found.st_size > max_bytes:
        raise JobError(f"{what}: holds more than {max_bytes >> 20} MiB")


def read_json(path: Path, what: str, max_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file holds; `what` names the file in errors.

    Raises JobError where `read_text` does, and where the text is not JSON, holds a key twice (a
    parser would drop one in silence) or a number that JSON does not have."""
    return parse(read_text(path, what, max_bytes), what, "JSON", _parse_json)


def parse(text: str, what: str, kind: str, parser: Callable[[str], Any]) -> Any:
    """Return what `parser` makes of a text; raises JobError where it refuses the text."""
    try:
        return parser(text)
    except RecursionError:
        raise JobError(f"{what}: not a {kind} file: nested too deeply") from None
    except ValueError as error:
        raise JobError(f"{what}: not a {kind} file: {first_line(error)}") from None


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=unique, parse_constant=_refuse, parse_float=_finite)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of its pairs; raises ValueError where a key stands twice."""
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


def show(value: Any, most: int = 60) -> str:
    """Write a value as Python does, on one line, at most so many characters of it."""
    try:
        return _cut(repr(value), most)
    except (ValueError, RecursionError):  # thousands of digits, hundreds of levels
        return f"a {type(value).__name__} too large to show"


def show_key(key: str) -> str:
    """Write a key on one line, at most 60 characters of it."""
    return _cut(repr(key)[1:-1])


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
