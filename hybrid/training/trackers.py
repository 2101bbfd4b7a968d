"""Sends the figures of each step to experiment trackers, through Accelerate's classes for them.

Only the process that writes `steps.jsonl` makes a `Trackers`. TensorBoard and Aim get a folder for
each run in `OUT/trackers/`; the others write where they always do, and some need the network and an
account. A tracker that raises ends the run: the user asked for that log."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..job.errors import JobError

PROJECT = "hybrid"
STEP_VALUES = ("loss", "grad_norm", "lr", "seconds", "memory_bytes", "loss_scale")  # a line's keys
EVAL_VALUES = ("loss", "perplexity", "accuracy")


def check_trackers(names: Sequence[str]) -> None:
    """Check the names of `log.trackers` before anything starts.

    Raises JobError for a name that Accelerate does not know or that is given twice, and
    ModuleNotFoundError, which says what to install, where a tracker's package is missing."""
    if not names:
        return  # the import below would import torch
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    for i, name in enumerate(names):
        if name not in LOGGER_TYPE_TO_CLASS:
            valid = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise JobError(f"log.trackers = {name!r}: unknown; valid: {valid}")
        if name in names[:i]:
            raise JobError(f"log.trackers = {list(names)!r}: names {name!r} twice")
        if name not in available:
            package = "'aim<4'" if name == "aim" else name
            raise ModuleNotFoundError(
                f"log.trackers = {name!r}: its package is not installed; pip install {package}",
                name=name,
            )


class Trackers:
    """Sends the same figures to every tracker that a job names.

    names: `log.trackers`; out: the run's folder; job: the job as a JSON object, which each tracker
    gets as the run's configuration. Raises what `check_trackers` raises."""

    def __init__(self, names: Sequence[str], out: Path, job: Mapping[str, Any]) -> None:
        check_trackers(names)
        folder, run = out / "trackers", time.strftime("%Y%m%d-%H%M%S")
        self.trackers = [_start(name, folder, run) for name in names]
        configuration = {"out": str(out)} | flatten(job)
        for tracker in self.trackers:
            tracker.store_init_configuration(configuration)

    def log(self, line: Mapping[str, Any], step: int) -> None:
        """Send the known figures of one line of `steps.jsonl`, and the speed that they give."""
        if self.trackers:
            self._send(step_values(line), step)

    def log_eval(self, result: Mapping[str, Any], step: int) -> None:
        """Send an evaluation after `step` steps: loss, perplexity or accuracy, and the metrics."""
        known = {key: result[key] for key in EVAL_VALUES if result.get(key) is not None}
        known |= result.get("metrics", {})
        self._send({f"eval_{key}": value for key, value in known.items()}, step)

    def finish(self) -> None:
        """End the run for every tracker; nothing may be sent after that."""
        for tracker in self.trackers:
            tracker.finish()

    def _send(self, values: dict[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step=step)


def _start(name: str, folder: Path, run: str) -> Any:
    """Start Accelerate's tracker of that name without an `Accelerator`."""
    from accelerate import tracking

    # Accelerate's own logger, and its question whether this process is the one that logs, would
    # each create Accelerate's state, and with it a process group, on this rank alone.
    log: Any = logging.getLogger(tracking.__name__)
    log.warning_once = log.warning
    tracking.logger = log
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        folder.mkdir(parents=True, exist_ok=True)
        tracker = kind(run, str(folder))
    elif name == "dvclive":  # in its default folder a run would delete what the last run left
        tracker = kind(PROJECT, dir=str(folder / run / name))
    else:
        tracker = kind(PROJECT)
    tracker.main_process_only = False
    tracker.start()
    return tracker


def step_values(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what the trackers get of one line of `steps.jsonl`, by the trackers' names."""
    values = {key: line[key] for key in STEP_VALUES if line.get(key) is not None}
    if "loss_scale" in values:
        values["skipped"] = int(line["skipped"])
    if seconds := values.pop("seconds", None):
        values |= {"step_s": seconds, "samples_per_s": line["samples"] / seconds}
        if isinstance(line.get("targets"), int) and line["targets"] != line["samples"]:
            values["tokens_per_s"] = line["targets"] / seconds
    return values


def flatten(section: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Flatten a nested JSON object to `a.b` keys; lists become JSON text, nulls are left out."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            simple = isinstance(value, (bool, int, float, str))
            flat[prefix + key] = value if simple else json.dumps(value)
    return flat
