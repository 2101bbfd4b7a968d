"""This module says how a module takes the input of a micro-batch, and which of its outputs counts.

It is the one place that decides this, for the whole model and for each stage."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Calling(NamedTuple):
    """Says how a module is called: `arguments(forward, value)`, and `output(result)`."""

    arguments: Callable[[Callable[..., Any], Any], Arguments]
    output: Callable[[Any], Any]


def spread(forward: Callable[..., Any], value: Any) -> Arguments:
    """Returns the arguments by which `forward` takes the input `value` of a micro-batch.

    The values of a dict go by keyword where `forward` has a parameter of one of their names, those
    of a tuple or list by position where it takes so many. Else the whole is its only argument.
    Raises TypeError where a dict has keys that `forward` does not take."""
    function = getattr(forward, "__func__", forward)
    bound = int(function is not forward)
    if isinstance(value, Mapping):
        surplus = _find_surplus(function, bound, tuple(value))
        if surplus:
            valid = ", ".join(inspect.signature(forward).parameters)
            raise TypeError(f"forward does not take {surplus!r} of the input; it takes: {valid}")
        return ((value,), {}) if surplus is None else ((), dict(value))
    if isinstance(value, (tuple, list)) and _takes(function, bound + len(value)):
        return tuple(value), {}
    return (value,), {}


@functools.lru_cache(maxsize=64)
def _find_surplus(function: Callable[..., Any], bound: int, keys: tuple[str, ...]) -> str | None:
    """Returns the first key that a function does not take by keyword; "" where it takes all.

    None: it takes none of them, so that the whole dict is an argument."""
    found = list(inspect.signature(function).parameters.values())[bound:]
    named = {p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in found)
    if named.isdisjoint(keys):
        needs_one = any(p.default is p.empty and p.name in named for p in found)
        return "" if takes_any and not needs_one else None
    return "" if takes_any else next((key for key in keys if key not in named), "")


@functools.lru_cache(maxsize=64)
def _takes(function: Callable[..., Any], count: int) -> bool:
    """Tells whether a function can be called with so many arguments by position."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    return True


def logits_of(result: Any) -> Any:
    """Returns the logits of an output object of transformers, and any other result as it is."""
    logits = getattr(result, "logits", None)
    return result if logits is None else logits


PLAIN = Calling(spread, logits_of)
OWN_LOSS = Calling(spread, lambda result: result)
