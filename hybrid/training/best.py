"""Tells which checkpoint is best by the metric that the job names.

`loss` and `perplexity` are better where they are lower, `accuracy` and the job's own metrics where
they are higher. A function of `train.metrics` goes before a quantity of the same name."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.folders import list_checkpoints, step_of
from ..checkpoint.manifest import BadManifest, read_manifest
from ..job.errors import JobError

LOWER = ("loss", "perplexity")


def score_of(evals: Iterable[Mapping[str, Any]], step: int, metric: str) -> float | None:
    """Return the score of the state after `step` steps, the higher the better.

    evals: of the run so far, as JSON of `records.StepEval`. None: there is no evaluation of this
    step, or the metric is no number there. Raises JobError where evaluations have no such metric.
    """
    found = [one["result"] for one in evals if one["step"] == step]
    if not found:
        return None
    value = found[-1]["metrics"].get(metric, found[-1].get(metric))
    if value is None:
        have = [name for name in ("loss", "accuracy", "perplexity") if found[-1][name] is not None]
        valid = ", ".join([*have, *found[-1]["metrics"]])
        raise JobError(
            f"checkpoint.best = {metric!r}: the evaluation of this job has no {metric}; "
            f"valid: {valid}"
        )
    number = float(value)
    return None if math.isnan(number) else -number if metric in LOWER else number


class BestScores:
    """Holds the scores of a run's checkpoints, by their steps."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._known: dict[int, float | None] = {}

    def note(self, step: int, evals: Sequence[Mapping[str, Any]]) -> None:
        """Take the score of a checkpoint that is being saved."""
        self._known[step] = score_of(evals, step, self.metric)

    def best(self, checkpoints: Path, newest: int) -> list[int]:
        """Return the step of the best checkpoint that is there, the newer of two alike.

        newest: see `prune`. Those of earlier runs are looked up in their manifests."""
        found = []
        for folder in list_checkpoints(checkpoints):
            step = step_of(folder)
            if step not in self._known:
                self._known[step] = self._read(folder, step)
            score = self._known[step]
            if step <= newest and score is not None:
                found.append((score, step))
        return [max(found)[1]] if found else []

    def _read(self, folder: Path, step: int) -> float | None:
        try:
            return score_of(read_manifest(folder).values["record"]["evals"], step, self.metric)
        except (BadManifest, JobError, LookupError, TypeError, ValueError):
            return None  # damaged, or without an evaluation that has this metric
