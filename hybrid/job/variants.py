"""This module resolves what a run is called: a strategy, or a variant of one that the job names.

    [variant.fsdp_keep]
    strategy = "fsdp"
    reshard_after_forward = false

A variant has the settings of its strategy's section, with its own on top, and its own degrees. It
is resolved here alone: whoever has a name and a job asks `resolve` for the strategy and the job
that the engine gets. The module needs no torch."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from .errors import JobError
from .messages import describe
from .schema import Job, Strategies, Variant

STRATEGIES = tuple(field.alias or name for name, field in Strategies.model_fields.items())
DEGREES = tuple(key for key in Variant.model_fields if key != "strategy")
READ_DEGREES = {"fsdp": ("replicate", "shard"), "2d": ("pp", "dp")}  # the others have one axis
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
# A comparison's folder has folders of these names for its own runs: controls, the small job.
_TAKEN = re.compile(r"proxy|.*_((cut|moved)_\d+(x\d+)?|emulation|again|third|off)")


@dataclasses.dataclass(frozen=True)
class Choice:
    """Holds what a name stands for: a strategy, and the job with the settings that it has there."""

    name: str
    strategy: str
    job: Job

    @property
    def variant_of(self) -> str | None:
        """Return the strategy of a variant, None where the name is a strategy's own."""
        return None if self.name == self.strategy else self.strategy


def resolve(job: Job, name: str) -> Choice:
    """Return what a name stands for in a job that `check_variants` has passed.

    A name that is no variant's is taken for a strategy's: the registry knows these."""
    variant = job.variant.get(name)
    if variant is None:
        return Choice(name, name, job)
    degrees = {key: value for key in DEGREES if (value := getattr(variant, key)) is not None}
    changed = _with_section(job, variant.strategy, variant.model_extra or {})
    parallel = job.parallel.model_copy(update=degrees)
    changed = changed.model_copy(update={"parallel": parallel, "variant": {}})
    return Choice(name, variant.strategy, changed)


def with_settings(job: Job, name: str, changes: dict[str, Any]) -> Job:
    """Return the job with these changes in the settings of a strategy or variant."""
    if name not in job.variant:
        return _with_section(job, name, changes)
    changed = job.variant[name].model_copy(update=changes)
    return job.model_copy(update={"variant": {**job.variant, name: changed}})


def _with_section(job: Job, strategy: str, changes: dict[str, Any]) -> Job:
    """Return the job with changes in one strategy's section; raises pydantic's ValidationError."""
    if not changes:
        return job
    section = job.settings(strategy)
    changed = type(section).model_validate(section.model_dump() | changes)
    field = "two_d" if strategy == "2d" else strategy
    return job.model_copy(update={"strategy": job.strategy.model_copy(update={field: changed})})


def check_variants(job: Job, where: str = "job") -> None:
    """Raise JobError, which begins with `where` and names the field, if a variant is wrong."""
    for name, variant in job.variant.items():
        field = f"{where}: variant.{name}"
        if name in STRATEGIES or not _PLAIN.fullmatch(name) or _TAKEN.fullmatch(name):
            valid = "letters, digits, _ and -, other than a strategy's name or a control's"
            raise JobError(f"{field}: cannot be a variant's name; valid: {valid}")
        if variant.strategy not in STRATEGIES and not _is_own(variant.strategy):
            valid = f"{', '.join(STRATEGIES)}, package.module"
            raise JobError(f"{field}.strategy = {variant.strategy!r}: unknown; valid: {valid}")
        _check_settings(job, variant, field)


def _is_own(name: str) -> bool:
    return "." in name and all(part.isidentifier() for part in name.split("."))


def _check_settings(job: Job, variant: Variant, field: str) -> None:
    strategy, settings = variant.strategy, type(job.settings(variant.strategy))
    own = _is_own(strategy)  # a strategy of one's own may read all degrees
    read = DEGREES if own else READ_DEGREES.get(strategy, ())
    for key in DEGREES:
        if getattr(variant, key) is not None and key not in read:
            valid = ", ".join(("strategy", *read, *settings.model_fields))
            raise JobError(f"{field}.{key}: has no effect under {strategy}; valid: {valid}")
    try:
        _with_section(job, strategy, variant.model_extra or {})
    except ValidationError as error:
        said = describe(error, settings, f"{field}.", ("strategy", *read))
        raise JobError(said) from None


def warnings_of(job: Job, names: Sequence[str]) -> list[str]:
    """Return the warnings of a job and, with its name in front, of each variant among `names`."""
    found = job.warnings()
    for choice in (resolve(job, name) for name in names if name in job.variant):
        new = [line for line in choice.job.warnings() if line not in found]
        found += [f"variant.{choice.name}: {line}" for line in new]
    return found
