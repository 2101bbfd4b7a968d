"""Checks what a file says against a table of the keys and values that are known. It needs no torch.

A row of a table has the keys of JSON Schema: `properties` for a section, `type`, `minimum`,
`maximum`, `exclusiveMinimum` and `enum` for a value. It differs from JSON Schema in this:
- `type` is a list, and `whole number` is an integer that is not written as 5e8.
- `words` are further values that are allowed, texts among them in upper and lower case.
- `quoted` allows a number that is written as text.
- `others` allows keys that `properties` does not name."""

import difflib
from typing import Any

from .reading import show, show_key

_KINDS: dict[str, type | tuple[type, ...]] = {
    "boolean": bool,
    "integer": int,
    "whole number": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
    "null": type(None),
}


def problem(value: Any, known: dict[str, Any], path: str = "") -> str | None:
    """Return the first thing that a row of the table does not allow, as `path: what`, or None."""
    if not _fits(value, known):
        return f"{path} = {show(value)}: valid: {_describe(known)}"
    if not isinstance(value, dict) or "properties" not in known:
        return None
    keys = known["properties"]
    for key, inner in value.items():
        here = ".".join(filter(None, (path, show_key(key))))
        if key not in keys and not known.get("others"):
            near = difflib.get_close_matches(key[:100], keys, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(keys)}"
            return f"{here}: unknown key; {hint}"
        if found := problem(inner, keys.get(key, {}), here):
            return found
    return None


def _fits(value: Any, known: dict[str, Any]) -> bool:
    if isinstance(value, str) and known.get("quoted"):
        return _fits(_number(value), known | {"quoted": False})
    if _folded(value) in map(_folded, known.get("words", ())):
        return True
    if "enum" in known and value is not None and value not in known["enum"]:
        return False
    if not any(_is_a(kind, value) for kind in known.get("type", _KINDS)):
        return False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    lowest, highest = known.get("minimum", value), known.get("maximum", value)
    return lowest <= value <= highest and value > known.get("exclusiveMinimum", value - 1)


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _number(text: str) -> Any:
    """Return the number that a text stands for, or the text itself where it is none."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def _is_a(kind: str, value: Any) -> bool:
    """Tell kinds apart as JSON Schema does: true is no number, and 5e8 is an integer."""
    if isinstance(value, bool):
        return kind == "boolean"
    whole = isinstance(value, float) and value.is_integer()
    return isinstance(value, _KINDS[kind]) or (kind == "integer" and whole)


def _describe(known: dict[str, Any]) -> str:
    if "enum" in known:
        return ", ".join(map(repr, known["enum"]))
    bounds = {"minimum": ">=", "maximum": "<=", "exclusiveMinimum": ">"}
    limits = [f"{sign} {known[bound]}" for bound, sign in bounds.items() if bound in known]
    types = " ".join([" or ".join(known["type"]), *limits])
    return " or ".join([*filter(None, [types]), *map(repr, known.get("words", ()))])
