"""This module calls the optimizer that a job names by import path, and checks what it returns."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ..job.errors import JobError
from ..job.imports import call_named
from ..job.schema import Job


def is_own(job: Job) -> bool:
    """Tell whether the job names an optimizer by import path."""
    return ":" in job.optimizer.name


def call_optimizer(job: Job, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make the job's own optimizer over parameter groups, each with `params` and `weight_decay`.

    The function gets the groups, each with `lr` too, and `optimizer.options` as keyword arguments.
    Where it has parameters `lr` or `weight_decay`, it gets the job's. Raises JobError where it
    cannot be called so, or where what it returns does not step these parameters as they are."""
    chosen = job.optimizer
    given = f"optimizer.name = {chosen.name!r}"
    rates = {"lr": chosen.lr, "weight_decay": chosen.weight_decay}
    for key in chosen.options.keys() & rates.keys():
        raise JobError(f"optimizer.options.{key}: set optimizer.{key} instead")
    groups = [group | {"lr": chosen.lr} for group in groups]
    wanted = {p for group in groups for p in group["params"]}
    made = call_named("optimizer", chosen.name, chosen.options, {}, [groups], rates)
    if not isinstance(made, torch.optim.Optimizer):
        kind = type(made).__name__
        raise JobError(f"{given}: returned a {kind}; valid: a torch.optim.Optimizer")
    if problem := _problem(job, made, wanted):
        raise JobError(f"{given}: {problem}")
    return made


def _problem(job: Job, made: torch.optim.Optimizer, wanted: set[Any]) -> str | None:
    """Say why an optimizer cannot step the model as the job asks, or return None."""
    held = [p for group in made.param_groups for p in group["params"]]
    if set(held) != wanted or len(held) != len(wanted):
        return (
            f"was given {len(wanted)} parameters and steps {len(set(held) & wanted)} of them; "
            "its param_groups must hold each of them once, and no others"
        )
    rates = {float(group.get("lr", "nan")) for group in made.param_groups}
    if rates != {job.optimizer.lr}:
        return (
            f"its groups have the rates {sorted(rates)}; valid: optimizer.lr in each, which the "
            "schedule then moves"
        )
    needed = [p.name for p in _arguments(made.step) if p.default is p.empty]
    if needed:
        return (
            f"its step needs {', '.join(needed)}; valid: one that steps without, since gradients "
            "are computed once a step"
        )
    if job.train.precision == "fp16" and getattr(made, "_step_supports_amp_scaling", False):
        return (
            "unscales fp16's gradients itself and does not see overflows in other ranks' shards; "
            "set fused = false in optimizer.options"
        )
    return None


def _arguments(function: Any) -> list[inspect.Parameter]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [p for p in found if p.kind not in several]
