"""This module calls what a job names: ours by its name, a user's by `package.module:function`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

from .errors import JobError, first_line


def check_name(section: str, name: str, known: Collection[str]) -> None:
    """Raise JobError unless `name` is a known one or looks like package.module:function."""
    module, colon, function = name.partition(":")
    if name in known or (colon and function.isidentifier() and module):
        return
    raise JobError(
        f"{section}.name = {name!r}: unknown; valid: {', '.join(known)}, package.module:function"
    )


def call_named(
    section: str, name: str, options: Mapping[str, Any], known: Mapping[str, str]
) -> Any:
    """Call the function that `section` of the job names with `options`, and return its result.

    `known` maps short names to `package.module:function`. Raises JobError where the function cannot
    be imported or refuses the options."""
    check_name(section, name, known)
    function = _import(section, name, known.get(name, name))
    given = f"{section}.options = {dict(options)!r} of {name!r}"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have no signature
        signature = None
    if signature:
        try:
            signature.bind(**options)
        except TypeError as error:
            raise JobError(f"{given}: {error}; valid: {', '.join(signature.parameters)}") from None
    try:
        return function(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"{given}: {first_line(error)}") from error


def _import(section: str, name: str, path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    loaded = import_module(f"{section}.name = {name!r}", module)
    found = getattr(loaded, function, None)
    if found is None:
        words = f"cannot be imported: module {module!r} has no attribute {function!r}"
        raise JobError(f"{section}.name = {name!r}: {words}")
    if not callable(found):
        raise JobError(f"{section}.name = {name!r}: is not a function")
    return found


def import_module(given: str, module: str) -> ModuleType:
    """Import and return a module that the job or the command names.

    Raises JobError, which begins with what was `given`, where it cannot be imported."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own file lies where the command is typed
    try:
        return importlib.import_module(module)
    except Exception as error:  # a user's file may raise anything while it is imported
        raise JobError(f"{given}: cannot be imported: {first_line(error)}") from error


def find_function(given: str, path: str) -> Callable[..., Any]:
    """Import and return the function that the job names by `package.module:function`.

    Raises JobError, which begins with what was `given`, where there is none."""
    module, colon, name = path.partition(":")
    if not (module and colon and name.isidentifier()):
        raise JobError(f"{given}: unknown; valid: package.module:function")
    function = getattr(import_module(given, module), name, None)
    if function is None:
        raise JobError(f"{given}: module {module!r} has no attribute {name!r}")
    if not callable(function) or isinstance(function, type):
        raise JobError(f"{given}: is not a function")
    found: Callable[..., Any] = function
    return found
