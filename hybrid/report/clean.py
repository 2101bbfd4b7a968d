"""This module takes out of a comparison what no reader should meet: escape sequences, endless text.

A text of the job, of a message or of a file's name may have control characters, by which it would
rewrite a terminal, or halves of characters, which no file in UTF-8 can hold. compare.json has every
text as it is."""

import dataclasses
from typing import Any, TypeVar

from ..job.shown import cut, without_controls

LONGEST = 20_000  # characters of a text, such as a traceback, that a page shows
T = TypeVar("T")


def clean(value: T) -> T:
    """Return a comparison, or a part of one, each of whose texts can be shown; keys too."""
    found: Any = value
    if isinstance(found, str):
        found = without_controls(cut(found, LONGEST))
    elif isinstance(found, dict):
        found = {clean(key): clean(item) for key, item in found.items()}
    elif isinstance(found, (list, tuple)) and found:
        found = type(found)(map(clean, found))
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        held = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        found = dataclasses.replace(found, **{key: clean(item) for key, item in held.items()})
    return found
