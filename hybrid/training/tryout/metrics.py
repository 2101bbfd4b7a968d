"""This module calls the job's metrics once: a run would do so after all of its training."""

import torch

from ...job.errors import JobError, tell_error
from ...job.users_code import passes
from ...models.metrics import load_metrics, take_metric
from .finding import Finding
from .nested import map_tensors
from .trial import Trial, describe


@torch.no_grad()
def check_metrics(trial: Trial) -> list[Finding]:
    """Find metrics that raise, or give anything but a sum and a count, for the first samples."""
    metrics = load_metrics(trial.job)
    if not metrics:
        return []
    output, _ = trial.evaluate(trial.batch, trial.ids)
    target = trial.batch.target
    found = []
    for path, (name, metric) in zip(trial.job.train.metrics, metrics.items(), strict=True):
        try:
            take_metric(name, metric, map_tensors(output, torch.clone), target)
        except JobError as error:  # what it returned
            found.append(Finding(str(error), fatal=True))
        except BaseException as error:  # a user's function may raise anything
            if passes(error):
                raise
            given = f"an output of {describe(output)} and a target of {describe(target)}"
            text = f"train.metrics = {path!r}: with {given} it raised {tell_error(error)}"
            found.append(Finding(text, fatal=True))
    return found
