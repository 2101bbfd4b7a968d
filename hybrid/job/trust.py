"""This module says which code a job would run that is not ours, and refuses it where nobody asked.

A job on the command line is the user's own. One that stands in the folder of a run or a checkpoint
may be somebody else's: what it names by `package.module:function` is imported, and so run, only
where that is trusted. The module needs no torch."""

from collections.abc import Collection

from .errors import JobError
from .schema import Job

HF = "hf:"


def named_functions(job: Job) -> dict[str, str]:
    """Return what a job names by import path, by the job's field: functions, and strategies."""
    fields = {
        "model.name": job.model.name,
        "data.name": job.data.name,
        "optimizer.name": job.optimizer.name,
        "schedule.name": job.schedule.name,
    }
    found = {key: name for key, name in fields.items() if ":" in name and not name.startswith(HF)}
    found |= {f"train.metrics[{i}]": name for i, name in enumerate(job.train.metrics)}
    variants = job.variant.items()
    found |= {f"variant.{n}.strategy": v.strategy for n, v in variants if "." in v.strategy}
    return found


def require_trust(where: str, job: Job, typed: Collection[str] = ()) -> None:
    """Raise JobError if the job in the folder `where` names anything by import path.

    typed: the fields that the command line has set, which are the user's own."""
    keys = _keys(typed)
    named = {k: name for k, name in named_functions(job).items() if k.partition("[")[0] not in keys}
    if named:
        words = ", ".join(f"{key} = {name!r}" for key, name in named.items())
        raise JobError(
            f"{where}: its job names code that reading it would run: {words}; valid: --trust where "
            "you trust it, or --job JOB, the job on the command line"
        )


def without_cache(job: Job, typed: Collection[str] = ()) -> Job:
    """Return the job of a folder without the folder to write tokens to that it names.

    They are kept in the default one then. typed: see `require_trust`."""
    if "data.options.cache" in _keys(typed):
        return job
    options = {key: value for key, value in job.data.options.items() if key != "cache"}
    return job.model_copy(update={"data": job.data.model_copy(update={"options": options})})


def _keys(typed: Collection[str]) -> set[str]:
    return {key.partition("=")[0].strip() for key in typed}
