"""This module holds functions that a caller in Python gives themselves, in place of their names.

    hybrid.compare(job, model=build, data=load)

The job then has names for them, such as `__main__:build`, by which `hybrid.job.imports` finds them
in this process and in those forked from it. No other process can. The module needs no torch."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from .errors import JobError
from .schema import Job
from .traces import show_file

Function = Callable[..., Any]
Given = Mapping[tuple[str, str], Function]  # by section and name: two may have one name
_given: ContextVar[Given | None] = ContextVar("given", default=None)


def given_functions() -> Given:
    """Return the functions that were given, by section and name; none outside `naming`."""
    return _given.get() or {}


@contextlib.contextmanager
def naming(
    job: Job, model: Function | None, data: Function | None, no_fork: str = ""
) -> Iterator[Job]:
    """Yield the job with names for these functions, which stand for them while this lasts.

    no_fork: why processes cannot be forked from this one, empty if they can. Then functions must be
    such that another process can import them. Raises JobError where they are not, and where one is
    no function."""
    names: dict[tuple[str, str], Function] = {}
    for section, function in (("model", model), ("data", data)):
        if function is None:
            continue
        if not callable(function):
            raise JobError(f"{section} = {function!r}: is not a function")
        name = name_of(function)
        if no_fork and not _can_be_imported(function):
            raise JobError(
                f"{section} = {describe(function)}: other processes cannot have this function, "
                f"since {no_fork}: put it into a file FILE.py, and set {section}.name to "
                f"'FILE:{name.rpartition('.')[2].rpartition(':')[2]}'"
            )
        names[section, name] = function
        named = getattr(job, section).model_copy(update={"name": name})
        job = job.model_copy(update={section: named})
    token = _given.set(None if no_fork else {**given_functions(), **names})
    try:
        yield job
    finally:
        _given.reset(token)


def name_of(function: Function) -> str:
    """Return MODULE:NAME of a function, as it is called where it is defined."""
    known = function if hasattr(function, "__qualname__") else type(function)
    name = f"{known.__module__}:{known.__qualname__}"
    return f"./{name}" if name.startswith("hf:") else name  # `hf:` begins a model of transformers


def describe(function: Function) -> str:
    """Return the name of a function, and the file and line where it is defined, if it has any."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    where = f" ({show_file(code.co_filename)}:{code.co_firstlineno})" if code else ""
    return f"{name_of(function)}{where}"


def _can_be_imported(function: Function) -> bool:
    """Tell whether the function's own module, imported by its name, has it under its name."""
    module, _, name = name_of(function).partition(":")
    if module == "__main__" or not name.isidentifier():
        return False
    found = sys.modules.get(module)
    by_import = getattr(found, "__spec__", None) is not None  # not made while the process ran
    return by_import and getattr(found, name, None) is function
