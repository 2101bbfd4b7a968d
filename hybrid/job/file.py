"""This module reads a job from a TOML or JSON file or a mapping, with `--set` overrides on top.

    job = load_job("launch/jobs/mnist.toml", ["train.steps=20", "optimizer.name=adamw"])

Every error is one line."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .errors import JobError
from .messages import describe
from .reading import parse, read_json, read_text, show_key
from .schema import EVALUATED, Job
from .variants import check_variants

MAX_TOML_BYTES = 2**16
# tomllib's time and memory grow with the square of a dotted key's parts: 8 s, 3 GB for 30,000.
_LONG_KEY = re.compile(r"""(?:(?<![\w"'-])[\w"'-]++[ \t]*+\.[ \t]*+){100}""")
NOT_BY_PROXY = ("optimizer.name", "train.precision")  # what is proved of one holds for no other
_INSTEAD = {"train.steps": "epochs", "train.epochs": "steps"}


def to_dict(job: Job) -> dict[str, Any]:
    """Return the whole job with its defaults, as `load_job` takes it back."""
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)


def load_job(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Job:
    """Load the job from a TOML or JSON file, or a mapping of the same shape, and override keys.

    `overrides` are "a.b=value" texts, the value in TOML or a bare word, or a mapping from "a.b" to
    the value. Raises JobError."""
    if isinstance(source, Mapping):
        data, where = _copy(source), "job"
    else:
        data, where = _read(Path(source)), str(source)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(parse_pair, overrides)
    job = _make_job(data, pairs, where)
    make_proxy(job, where)  # an error in it shows now
    return job


def make_proxy(job: Job, where: str = "job") -> Job | None:
    """Return the small job that `[proxy]` makes of a job, None where it has no such section.

    where: what errors begin with. Raises JobError if there can be no such job, or if it would not
    show what the real one does."""
    if not job.proxy:
        return None
    data = to_dict(job)
    overrides = dict(flatten(data.pop("proxy")))
    for key in overrides:
        if key in NOT_BY_PROXY or key.partition(".")[0] == "proxy":
            valid = "fewer layers, less width, less data, fewer steps"
            raise JobError(
                f"{where}: proxy.{key}: a proxy computes as the job does; valid: {valid}"
            )
    return _make_job(data, overrides.items(), f"{where}: [proxy]")


def _make_job(data: dict[str, Any], pairs: Iterable[tuple[str, Any]], where: str) -> Job:
    for key, value in pairs:
        _assign(data, key, value)
    try:
        job = Job.model_validate(data)
    except ValidationError as error:
        raise JobError(f"{where}: {describe(error, Job)}") from None
    check_variants(job, where)
    _check_best(job, where)
    return job


def _check_best(job: Job, where: str) -> None:
    """Raise JobError if an evaluation of the job has no such metric as `checkpoint.best`."""
    best, valid = job.checkpoint.best, list(EVALUATED)
    valid += [metric.rpartition(":")[2] for metric in job.train.metrics]
    if best is not None and best not in valid:
        valid.append("the name of a function in train.metrics")
        raise JobError(f"{where}: checkpoint.best = {best!r}: unknown; valid: {', '.join(valid)}")


def flatten(section: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """List the values in a section of sections by their dotted keys."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


def _copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in mapping.items()}


def _read(path: Path) -> dict[str, Any]:
    """Return the mapping in a TOML file, or in a JSON file such as a run's own `job.json`."""
    if path.suffix == ".json":
        data = read_json(path, str(path))
    else:
        text = read_text(path, str(path), MAX_TOML_BYTES)
        data = parse(text, str(path), "TOML", _parse_toml)
    if not isinstance(data, dict):
        raise JobError(f"{path}: holds a {type(data).__name__}, a job is sections of keys")
    return data


def _parse_toml(text: str) -> dict[str, Any]:
    """Return what a text in TOML holds; raises ValueError or RecursionError where it cannot."""
    if found := _LONG_KEY.search(text):
        raise ValueError(f"more than 100 parts in the key {show_key(found[0])}")
    return tomllib.loads(text)


def parse_pair(text: str) -> tuple[str, Any]:
    """Return the key and the value of `--set A.B=VALUE`; raises JobError where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {text!r}: write a.b=value, such as train.steps=20")
    try:
        return key.strip(), _parse_toml(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # a bare word
        return key.strip(), value.strip()


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    if key in _INSTEAD:  # an override of one length of the run replaces the file's other one
        train = data.get("train")
        if isinstance(train, dict):
            train.pop(_INSTEAD[key], None)
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise JobError(f"--set {key}: {parent} holds a value, not a section")
    data[last] = value
