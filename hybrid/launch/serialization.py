"""This module writes what ranks tell one another as JSON, and reads it without running any of it.

What comes over a socket may come from a stranger, and a pickle of his would run his code. JSON has
fewer types, so an object with a single key stands for each of the others:

    (1, nan) is {"tuple": [1, {"float": "7ff8000000000000"}]}

Classes travel by name, and only those that are `sendable`. The module needs no torch."""

import dataclasses
import json
import math
import numbers
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..job.errors import JobError, Refused, RunError, Unsupported
from ..layout import LayoutError

C = TypeVar("C", bound=type)
_PLAIN = {type(None), bool, int, str}
_classes = dict[str, type]()


def sendable(cls: C) -> C:
    """Let the values of a dataclass, a NamedTuple or an error travel, as their fields do.

    An error travels with its arguments, as the nearest class that is sendable."""
    _classes[_name(cls)] = cls
    return cls


def dumps(value: Any) -> bytes:
    """Return a value as JSON: numbers, texts, None, paths, dtypes, containers, sendable classes.

    Floats keep their bits, also those of a NaN. Keys of a dict are of any of these types. A number
    or text of another type, such as NumPy's, arrives as Python's own. Raises TypeError for any
    other type."""
    return json.dumps(_write(value), separators=(",", ":"), allow_nan=False).encode()


def loads(data: bytes) -> Any:
    """Return the value that `dumps` wrote; raises RunError where these bytes are none of its."""
    try:
        return json.loads(data, object_hook=_read, parse_constant=_refuse)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise RunError(f"a rank sent what no rank of this run sends: {error!r}"[:300]) from None


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _write(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is list:
        return [_write(one) for one in value]
    if kind is dict:
        return {"dict": [[_write(key), _write(one)] for key, one in value.items()]}
    for name, kinds in _CONTAINERS.items():
        if kind is kinds or (name == "tuple" and _name(kind) == "torch.Size"):
            return {name: [_write(one) for one in value]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if isinstance(value, Path):
        return {"path": str(value)}
    if _name(kind) == "torch.dtype":
        return {"dtype": str(value).removeprefix("torch.")}
    if _name(kind) in _classes and not isinstance(value, BaseException):
        return {"object": [_name(kind), [_write(one) for one in _fields(value)]]}
    return _write_other(value)


def _write_other(value: Any) -> Any:
    """Return an error, or a number or text of a type that is not Python's own."""
    for cls in type(value).__mro__:
        if isinstance(value, BaseException) and _name(cls) in _classes:
            said = [str(one) for one in value.args], getattr(value, "name", None)
            return {"error": [_name(cls), *map(_write, said)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and (value != value or float(value) == value):
        return _write(float(value))
    raise TypeError(f"{type(value).__name__} cannot be sent to other ranks: {value!r}"[:300])


def _fields(value: Any) -> Sequence[Any]:
    if isinstance(value, tuple):
        return value
    return [getattr(value, field.name) for field in dataclasses.fields(value) if field.init]


def _read(found: dict[str, Any]) -> Any:
    ((kind, held),) = found.items()
    return _READERS[kind](held)


def _read_object(held: Sequence[Any]) -> Any:
    name, values = held
    cls: Any = _classes[name]
    if issubclass(cls, BaseException):
        raise ValueError(f"{name} is an error")
    if issubclass(cls, tuple):
        return cls(*values)
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    return cls(**dict(zip(names, values, strict=True)))


def _read_error(held: Sequence[Any]) -> BaseException:
    name, arguments, module = held
    cls: Any = _classes[name]
    if not issubclass(cls, BaseException):
        raise ValueError(f"{name} is no error")
    found: BaseException = cls(*arguments)
    if isinstance(found, ImportError):
        found.name = module
    return found


def _read_dtype(name: str) -> Any:
    import torch

    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


_CONTAINERS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_READERS: dict[str, Callable[[Any], Any]] = {
    **_CONTAINERS,
    "dict": dict,
    "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "bytes": bytes.fromhex,
    "path": Path,
    "dtype": _read_dtype,
    "object": _read_object,
    "error": _read_error,
}
for _error in (JobError, Refused, Unsupported, LayoutError, ModuleNotFoundError):
    sendable(_error)
