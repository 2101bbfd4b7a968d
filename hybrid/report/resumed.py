"""This module tells which runs were interrupted, where, and as what they were resumed."""

from collections.abc import Mapping
from pathlib import PurePath

from ..records import Record
from .formats import DASH, group_names

PARTS = 3  # of a checkpoint's path: the run's folder, `checkpoints`, the step's
SHOWN = 12  # digits of a hash


def format_resumed(name: str, record: Record) -> str:
    """Format where the run called `name` was interrupted: 'step 4', 'step 4 as fsdp'."""
    if record.resumed_from is None:
        return DASH
    return f"step {record.resumed_from.step}{_tell_other(name, record)}"


def tell_resumed(runs: Mapping[str, Record]) -> list[str]:
    """Tell of each run that was interrupted after which step, and as what it was resumed."""
    found = {
        name: (run.resumed_from.step, _tell_other(name, run))
        for name, run in runs.items()
        if run.resumed_from
    }
    told = [
        f"{names}: interrupted after step {step} and resumed{other}."
        for (step, other), names in group_names(found.items()).items()
    ]
    return [*told, "Costs of a resumed run are of what came after."] if told else []


def tell_source(name: str, record: Record) -> list[str]:
    """Tell of one run from which checkpoint it went on, whose path begins with the run's folder.

    The hash was taken of the live state once it was loaded: it is the one that was saved."""
    source = record.resumed_from
    if source is None:
        return []
    path = "/".join(PurePath(source.path).parts[-PARTS:])
    same = f"the state that it loaded has the hash that was saved, {source.state_hash[:SHOWN]}"
    return [
        f"It was interrupted after step {source.step} and resumed{_tell_other(name, record)} from "
        f"{path}: {same}."
    ]


def _tell_other(name: str, record: Record) -> str:
    return "" if record.strategy == name else f" as {record.strategy}"
