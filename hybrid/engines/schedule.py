"""This module has the learning rate of each optimizer step, the same under every strategy."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

from ..job.errors import JobError, tell_error
from ..job.imports import import_function, parameter_names
from ..job.reading import show
from ..job.schema import Job
from ..job.users_code import passes

LARGEST = 3.4e38  # fp32 holds no greater rate, and optimizers take it as such
TRIED = 10_000  # steps of a run of which a schedule of one's own is asked before it starts


def learning_rate(job: Job, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Warm-up rises in equal parts to `optimizer.lr`. A linear or cosine schedule then falls towards
    `schedule.min_lr`, which every step after the last has (cosine: Loshchilov and Hutter 2017,
    without restarts). A function by import path gives the factor of `optimizer.lr` for each step.
    Raises JobError where that is no finite number from 0 on, and ValueError if a schedule needs
    `job.train.steps` and it is not known yet (`resolve_lengths`)."""
    if ":" in job.schedule.name:
        return job.optimizer.lr * _factor(job, step)
    peak, warmup, low = job.optimizer.lr, job.schedule.warmup_steps, job.schedule.min_lr
    if step < warmup:
        return peak * (step + 1) / warmup
    if job.schedule.name == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, _total(job) - warmup))
    falling = 1 - progress
    if job.schedule.name == "cosine":
        falling = (1 + math.cos(math.pi * progress)) / 2
    return low + (peak - low) * falling


def check_schedule(job: Job) -> None:
    """Raise JobError where a schedule by import path has no rate for a step of the run.

    It is called for each step, of a long run for the first ones, the last and some between, and for
    step 0 twice: its ranks must agree in every run."""
    if ":" not in job.schedule.name:
        return
    given = f"schedule.name = {job.schedule.name!r}"
    first, total = learning_rate(job, 0), _total(job)
    for step in range(1, min(total, TRIED)):
        learning_rate(job, step)
    for step in range(TRIED, total, max(1, (total - TRIED) // TRIED)):
        learning_rate(job, step)
    if total > TRIED:
        learning_rate(job, total - 1)
    if learning_rate(job, 0) != first:
        raise JobError(f"{given}: gives another factor for step 0 when it is called again")


def _total(job: Job) -> int:
    if job.train.steps is None:
        raise ValueError("train.steps is not known yet; call resolve_lengths first")
    return job.train.steps


def _factor(job: Job, step: int) -> float:
    """Call the job's own schedule for one step."""
    name, options = job.schedule.name, dict(job.schedule.options)
    function, takes_total = _function(name)
    if takes_total:
        options.setdefault("total_steps", _total(job))
    given = f"schedule.name = {name!r}: step {step}"
    try:
        factor = function(step, **options)
    except BaseException as error:  # a user's function may raise anything
        if passes(error):
            raise
        raise JobError(f"{given}: {tell_error(error)}") from error
    if hasattr(factor, "item"):  # a number of torch or numpy
        factor = factor.item()
    number = isinstance(factor, numbers.Real) and not isinstance(factor, bool)
    if not number or not 0 <= factor < math.inf:
        raise JobError(f"{given}: gave {show(factor)}; valid: a factor of optimizer.lr, >= 0")
    if job.optimizer.lr * factor > LARGEST:
        raise JobError(f"{given}: gave {show(factor)}; valid: a rate of at most {LARGEST:.2g}")
    return float(factor)


@functools.cache
def _function(name: str) -> tuple[Callable[..., Any], bool]:
    """Import a schedule; also tell whether it takes the number of steps of the run."""
    function = import_function("schedule", name, name)
    return function, "total_steps" in (parameter_names(function) or ())
