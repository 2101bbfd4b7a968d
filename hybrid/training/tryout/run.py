"""This module runs the whole try-out of a job: `try_out`. It imports torch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...data.seeds import kept_generators
from ...job.errors import JobError, first_line
from ...job.schema import Job
from ...models.layers import Layers
from ...models.losses import Loss
from .finding import SEVERAL, Finding, first_fatal, list_names
from .gradients import check_gradients, has_finite_gradients
from .lengths import check_lengths
from .losses import check_loss, check_reach
from .metrics import check_metrics
from .nested import all_finite
from .passes import check_passes, first_not_finite, moved_buffers, refuses_one_sample
from .samples import blame_samples, check_samples, suspect_samples
from .targets import check_set, check_targets, last_scores
from .tensors import check_tensors
from .trial import Trial, describe


@dataclasses.dataclass(frozen=True)
class Result:
    """Holds what a try-out found.

    lone_sample: the layers by which a micro-batch of a single sample cannot be trained on."""

    findings: tuple[Finding, ...]
    lone_sample: str | None = None


def try_out(
    job: Job, layers: Layers, loss: Loss, train: Sequence[Any], test: Sequence[Any]
) -> Result:
    """Try a job out on the first samples of its sets.

    layers: of a model made for this. Where it is on the meta device, since it is large, only data,
    shapes and dtypes are looked at. `job.train.steps` is known. What the user's own code raises
    becomes a finding with the line of theirs."""
    found = [
        *check_lengths(job, len(train), len(test)),
        *check_tensors(f"model.name = {job.model.name!r}", layers),
    ]
    if first_fatal(found):
        return Result(tuple(found))
    real = not any(t.is_meta for t in layers.tensors().values())
    with kept_generators():
        try:
            trial = Trial(job, layers, loss, train)
            more, lone = _run(trial, test) if real else (_look_at_data(trial, test), None)
        except JobError as error:
            more, lone = [Finding(first_line(error), fatal=True)], None
    return Result((*found, *more), lone)


def _look_at_data(trial: Trial, test: Sequence[Any]) -> list[Finding]:
    """Do what needs no model: one on the meta device has no numbers to compute with."""
    found = check_samples(trial)
    scores = last_scores(trial)
    if scores and (wrong := check_set(trial, scores, test)):
        found.append(wrong)
    if said := blame_samples(trial.samples, suspect_samples(trial)):
        text = f"{trial.data_name}: {said}; see that the model leaves such numbers out"
        found.append(Finding(text))
    return found


def _run(trial: Trial, test: Sequence[Any]) -> tuple[list[Finding], str | None]:
    """Do all passes, each once that those before found nothing which would make it meaningless."""
    found = check_samples(trial)
    given, ids = trial.batch.input, trial.ids
    try:
        output = trial.forward(given, ids)
        moved = moved_buffers(trial)
        if wrong := check_targets(trial, output, test):
            return [*found, wrong], None
        if wrong := _not_finite(trial, output):
            return [*found, wrong], None
        found += _check_loss(trial, output)
        if not first_fatal(found):
            found += check_passes(trial, output)
            found += _tell_moved(trial, moved)
            found += [*_check_test(trial, test), *check_metrics(trial)]
        return found, refuses_one_sample(trial)
    finally:
        trial.free()


def _check_loss(trial: Trial, output: Any) -> list[Finding]:
    found = check_loss(trial, output)
    if first_fatal(found):
        return found
    found += check_reach(trial, output)
    if first_fatal(found):
        return found
    count = float(trial.take_loss(output, trial.batch.target)[1])
    return found + check_gradients(trial, output, count)


def _not_finite(trial: Trial, output: Any) -> Finding | None:
    """Find the sample, the layer or the loss by which the loss is not finite.

    Infinite outputs (masked classes), and inputs of nan that a model takes for missing values, are
    let through where the loss is finite all the same."""
    total, _ = trial.take_loss(output, trial.batch.target)
    if not bool(total.isfinite()):
        text = _blame(trial, trial.batch.input, trial.ids, output)
        return Finding(
            f"{text}: the loss is {float(total.detach())} before the first step", fatal=True
        )
    for i in suspect_samples(trial):
        sample = trial.load([i])
        output, total = trial.evaluate(sample, [i], graph=True)
        if not (bool(total.isfinite()) and has_finite_gradients(trial, total)):
            text = _blame(trial, sample.input, [i], output)
            return Finding(f"{text}: so is its loss, or a gradient of it", fatal=True)
    return None


def _blame(trial: Trial, given: Any, ids: list[int], output: Any) -> str:
    if said := blame_samples(trial.samples, ids):
        return f"{trial.data_name}: {said}"
    if not all_finite(output):
        where = first_not_finite(trial, given, ids)
        return f"{trial.model_name}: {where} gives numbers that are not finite for finite ones"
    return f"{trial.model_name}: the loss of a finite output ({describe(output)}) is not finite"


def _tell_moved(trial: Trial, moved: list[str]) -> list[Finding]:
    if not moved:
        return []
    verb = "moves" if len(moved) == 1 else "move"
    text = (
        f"buffer {list_names(moved)} {verb} in forward: each rank moves its own, each micro-batch"
    )
    mend = "so that what hangs on it is not what single computes; keep it constant in training"
    return [Finding(f"{trial.model_name}: {text}, {mend}", SEVERAL)]


def _check_test(trial: Trial, test: Sequence[Any]) -> list[Finding]:
    """Find what would keep the evaluation from a number: on the first samples of the test set."""
    ids = list(range(min(len(test), len(trial.ids))))
    batch = trial.load(ids, test)
    _, total = trial.evaluate(batch, ids)
    if bool(total.isfinite()):
        return []
    said = blame_samples(test, ids)
    text = said.replace("train set", "test set") if said else "the loss of the test set's first"
    text += "" if said else " samples is not finite"
    return [Finding(f"{trial.data_name}: {text}: so will be the evaluation")]
