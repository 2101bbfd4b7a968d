"""This module keeps what an optimizer holds beside tensors and numbers of each parameter.

These are numbers in its parameter groups that it changes by itself, such as the `k` of a
schedule-free optimizer or the `d` of Prodigy, and the keys under which it keeps None. Attributes of
the optimizer object are no state: nothing reads them."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..checkpoint.tensors import dtype_name, dtype_of
from ..job.errors import JobError

NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
_NOT_KEPT = {"params", "lr"}  # the engine has the parameters, and sets the rate in each step
# The groups as they were when an optimizer was made.
_MADE: WeakKeyDictionary[torch.optim.Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()


def note_groups(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Note the groups of an optimizer that has just been made, and return it."""
    _MADE[optimizer] = [_copied(group) for group in optimizer.param_groups]
    return optimizer


def read_numbers(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return, as JSON, what `put_numbers` takes back.

    These are the numbers of each group that are not what they were when the optimizer was made, and
    the keys under which it keeps None of a parameter.
    Raises JobError where it keeps what a checkpoint cannot hold."""
    if problem := unsaved(optimizer):
        raise JobError(f"optimizer.name: {problem}")
    groups = [
        {key: as_json(value) for key, value in group.items()} for group in _changed(optimizer)
    ]
    states = list(optimizer.state.values())
    nones = sorted({key for state in states for key, value in state.items() if value is None})
    return {"groups": groups, "none": nones} if nones or any(groups) else {}


def put_numbers(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Take over what `read_numbers` returned, after the state by parameter.

    Raises JobError where the optimizer that it is of had other groups, with other numbers."""
    here: list[dict[str, Any]] = optimizer.param_groups
    groups: Sequence[Mapping[str, Any]] = saved.get("groups", [])
    if groups and len(groups) != len(here):
        if any(group != groups[0] for group in groups):
            raise JobError(
                f"optimizer.name: the checkpoint has numbers of {len(groups)} parameter groups, "
                f"which differ, and here are {len(here)}"
            )
        groups = [groups[0]] * len(here)
    for group, numbers in zip(here, groups, strict=False):
        for key, value in numbers.items():
            group[key] = from_json(value, group.get(key))
    for state in optimizer.state.values():
        for key in saved.get("none", []) if state else []:
            state.setdefault(key, None)


def unsaved(optimizer: torch.optim.Optimizer) -> str | None:
    """Say what an optimizer keeps that a checkpoint cannot hold, None: it can hold all of it."""
    valid = "valid in a checkpoint: tensors and numbers of each parameter, numbers in its groups"
    for owner, state in optimizer.state.items():
        if not isinstance(owner, torch.Tensor):
            return f"it keeps state under {owner!r}, of no parameter; {valid}"
        for key, value in state.items():
            if not isinstance(key, str):
                return f"it keeps state under {key!r}, which is no name; {valid}"
            if value is not None and type(value) not in NUMBERS and not _is_plain(value):
                return f"it keeps a {type(value).__name__}, {key!r}, of a parameter; {valid}"
    for group in _changed(optimizer):
        for key, value in group.items():
            number = value is None or type(value) in (*NUMBERS, str)
            if not number and not (_is_plain(value) and value.numel() == 1):
                return f"it changes a {type(value).__name__}, {key!r}, in its groups; {valid}"
    return None


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a tensor of a kind that a file can hold."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    try:
        dtype_name(value.dtype)
    except ValueError:
        return False
    return True


def _changed(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return what each group has now that it had not when the optimizer was made."""
    made = _MADE.get(optimizer)
    if made is None:
        return []
    return [
        {key: value for key, value in now.items() if _differs(key, value, before)}
        for now, before in zip(optimizer.param_groups, made, strict=True)
    ]


def _differs(key: str, value: Any, before: Mapping[str, Any]) -> bool:
    if key in _NOT_KEPT:
        return False
    if key not in before or type(value) is not type(before[key]):
        return True
    if isinstance(value, torch.Tensor):
        return not torch.equal(value, before[key].to(value.device))
    return bool(value != before[key])


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group without what is not kept; its lists and tensors may change in place."""
    kept = {key: value for key, value in group.items() if key not in _NOT_KEPT}
    return {key: _copy(value) for key, value in kept.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, (list, dict, set)) else value


def as_json(value: Any) -> Any:
    """Return a number as JSON, which has no infinity, and no tensors."""
    if isinstance(value, torch.Tensor):
        return {"tensor": as_json(value.item()), "dtype": dtype_name(value.dtype)}
    if isinstance(value, float) and value - value != 0:
        return {"float": repr(value)}
    return value


def from_json(value: Any, live: Any = None) -> Any:
    """Return a number from JSON; a tensor that the group has takes it over in place."""
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    number = from_json(value["tensor"])
    if isinstance(live, torch.Tensor):
        with torch.no_grad():
            return live.fill_(number)
    return torch.tensor(number, dtype=dtype_of(value["dtype"]))
