"""This module calls what a job names: ours by its name, a user's by `package.module:function`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

from .errors import JobError, first_line, tell_error
from .given import given_functions
from .reading import show
from .traces import is_users
from .users_code import held_exit, passes


def check_name(section: str, name: str, known: Collection[str]) -> None:
    """Raise JobError unless `name` is a known one or looks like package.module:function."""
    module, colon, function = name.partition(":")
    if (
        name in known
        or (section, name) in given_functions()
        or (colon and function.isidentifier() and module)
    ):
        return
    raise JobError(
        f"{section}.name = {name!r}: unknown; valid: {', '.join(known)}, package.module:function"
    )


def call_named(
    section: str,
    name: str,
    options: Mapping[str, Any],
    known: Mapping[str, str],
    arguments: Sequence[Any] = (),
    offered: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Call the function that `section` of the job names with `options`, and return its result.

    `known` maps short names to `package.module:function`. arguments: come before the options.
    offered: further keyword arguments, for a function that has parameters of these names. Raises
    JobError where the function cannot be imported, refuses the options or raises; the message names
    the user's line."""
    check_name(section, name, known)
    function = import_function(section, name, known.get(name, name))
    given = f"{section}.options = {show(dict(options), 200)} of {name!r}"
    names = parameter_names(function)
    more = {key: value for key, value in offered.items() if key in (names or ())}
    if names is not None:
        try:
            inspect.signature(function).bind(*arguments, **options, **more)
        except TypeError as error:
            valid = ", ".join(names) or "none, it takes no arguments"
            raise JobError(f"{given}: {error}; valid: {valid}") from None
    try:
        with held_exit():
            return function(*arguments, **options, **more)
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"{given}: {first_line(error)}") from error
    except BaseException as error:  # a user's function may raise anything
        if passes(error) or (name in known and isinstance(error, Exception)):
            raise
        raise JobError(f"{given}: {tell_error(error)}") from error


def parameter_names(function: Callable[..., Any]) -> list[str] | None:
    """Name a function's parameters; None where it does not tell them, as some builtins."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def import_function(section: str, name: str, path: str) -> Callable[..., Any]:
    """Import what `section` of the job names, by its path `package.module:function`.
    Raises JobError where it cannot be imported or called."""
    if given := given_functions().get((section, name)):
        return given
    if path.partition(":")[0] == "__main__":
        raise JobError(
            f"{section}.name = {name!r}: was given as a function in Python, which this process "
            "does not have: put it into a file FILE.py, valid: FILE:function"
        )
    return find_function(f"{section}.name = {name!r}", path)


def import_module(given: str, module: str) -> ModuleType:
    """Import and return a module that the job or the command names.

    Raises JobError, which begins with what was `given`, where it cannot be imported."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        # A user's own file lies where the command is typed. It comes last, or a `random.py` there
        # would be what libraries import.
        sys.path.append(os.getcwd())
    try:
        with held_exit():
            loaded = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise JobError(f"{given}: cannot be imported: {first_line(error)}") from error
    except BaseException as error:  # a user's file may raise anything while it is imported
        if passes(error):
            raise
        raise JobError(f"{given}: cannot be imported: {tell_error(error)}") from error
    _require_own(given, module, loaded)
    return loaded


def _require_own(given: str, module: str, loaded: ModuleType) -> None:
    """Raise JobError where a library's module was imported, and a file here has the same name."""
    first = module.partition(".")[0]
    mine = next(
        (name for name in (f"{first}.py", f"{first}/__init__.py") if os.path.exists(name)), None
    )
    file = getattr(loaded, "__file__", None) or next(iter(getattr(loaded, "__path__", [])), None)
    if mine is None or first == "hybrid" or (file and is_users(file)):
        return
    raise JobError(
        f"{given}: imports {file or 'a module of Python itself'}, which hides {mine} here; valid: "
        f"{mine} renamed, or PYTHONPATH=. to look here first"
    )


def find_function(given: str, path: str) -> Callable[..., Any]:
    """Import and return what the job names by `package.module:function`.

    Raises JobError, which begins with what was `given`, where there is none, or it is not called.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name.isidentifier()):
        raise JobError(f"{given}: unknown; valid: package.module:function")
    loaded = import_module(given, module)
    function: Callable[..., Any] | None = getattr(loaded, name, None)
    if function is None:
        words = f"cannot be imported: module {module!r} has no attribute {name!r}"
        raise JobError(f"{given}: {words}")
    if not callable(function):
        raise JobError(f"{given}: is not a function")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise JobError(f"{given}: is a coroutine function; valid: one without `async`")
    return function
