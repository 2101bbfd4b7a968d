"""This module imports the metrics that a job names, and takes each as (sum, count)."""

from collections.abc import Callable
from typing import Any

import torch

from ..job.errors import JobError
from ..job.imports import find_function
from ..job.schema import Job

Metric = Callable[[Any, Any], Any]


def load_metrics(job: Job) -> dict[str, Metric]:
    """Returns the functions of `train.metrics` by their own names.

    Raises JobError where one cannot be imported, is no function, or has the name of another."""
    found: dict[str, Metric] = {}
    for path in job.train.metrics:
        given, name = f"train.metrics = {path!r}", path.rpartition(":")[2]
        function = find_function(given, path)
        if name in found:
            raise JobError(f"{given}: another metric is called {name!r} too; valid: other names")
        found[name] = function
    return found


def take_metric(name: str, metric: Metric, output: Any, target: Any) -> tuple[Any, Any]:
    """Calls a metric and returns its sum and count, numbers or tensors of one.

    Raises JobError, which names the metric, where it gives anything else."""
    given = metric(output, target)
    pair = isinstance(given, (tuple, list)) and len(given) == 2
    if not pair or not all(_is_number(part) for part in given):
        kind = f"{len(given)} values" if isinstance(given, (tuple, list)) else type(given).__name__
        raise JobError(
            f"train.metrics: {name} returned {kind}; it must return (sum, count), two numbers"
        )
    return given[0], given[1]


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    return hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
