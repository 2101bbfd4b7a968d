"""This module writes what pydantic finds wrong in a section of the job as one line."""

import difflib
from collections.abc import Sequence
from types import UnionType
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .reading import show, show_key


def describe(
    error: ValidationError, root: type[BaseModel], inside: str = "", also: Sequence[str] = ()
) -> str:
    """Write the first error of a validation as `field = value: what is wrong; what is valid`.

    root: the section that was validated. inside: the dotted name of it, with a dot at the end.
    also: keys that are valid there and that `root` does not have."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] == "missing")  # missing keys come last
    field, valid = _locate(first["loc"], root)
    valid = [*also, *valid]
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        near = difflib.get_close_matches(unknown[:100], valid, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        where = ".".join(filter(None, (field, show_key(unknown))))
        return f"{inside}{where}: unknown key; {hint}valid: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{inside}{field}: missing; it has no default"
    shown = "" if first["type"] == "value_error" else f" = {show(first['input'])}"
    messages = dict.fromkeys(e["msg"] for e in errors if _locate(e["loc"], root)[0] == field)
    return f"{inside}{field}{shown}: {'; or '.join(messages).replace('Value error, ', '')}"


def _locate(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[str, list[str]]:
    """Return the dotted field of a pydantic location, and the keys that are valid in its section.

    A union appends the names of its members to the location: these are left out."""
    section, names, parts = root, list[str](), list(map(str, loc))
    while parts:
        name = parts.pop(0)
        fields = {f.alias or n: f for n, f in section.model_fields.items()}
        if name not in fields:
            break
        names.append(name)
        kind = _without_none(fields[name].annotation)
        if get_origin(kind) is dict and parts and _is_section(get_args(kind)[1]):
            names.append(show_key(parts.pop(0)))  # a name that the author chose
            kind = get_args(kind)[1]
        if not _is_section(kind):
            break
        section = kind
    return ".".join(names), [f.alias or n for n, f in section.model_fields.items()]


def _without_none(kind: Any) -> Any:
    """Return the section that may be left out, where an annotation is `Section | None`."""
    members = [member for member in get_args(kind) if member is not type(None)]
    return members[0] if isinstance(kind, UnionType) and len(members) == 1 else kind


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
