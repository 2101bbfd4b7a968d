"""This module reads a job from a TOML or JSON file or a mapping, with `--set` overrides on top.

    job = load_job("launch/jobs/mnist.toml", ["train.steps=20", "optimizer.name=adamw"])

Every error is one line."""

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import JobError
from .reading import parse, read_json, read_text, show, show_key
from .schema import Job

MAX_TOML_BYTES = 2**16
# tomllib's time and memory grow with the square of a dotted key's parts: 8 s, 3 GB for 30,000.
_LONG_KEY = re.compile(r"""(?:(?<![\w"'-])[\w"'-]++[ \t]*+\.[ \t]*+){100}""")
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
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_parse_pair, overrides)
    for key, value in pairs:
        _assign(data, key, value)
    try:
        return Job.model_validate(data)
    except ValidationError as error:
        raise JobError(f"{where}: {_one_line(error)}") from None


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


def _parse_pair(text: str) -> tuple[str, Any]:
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


def _one_line(error: ValidationError) -> str:
    """Write the first error of a validation as `field = value: what is wrong; what is valid`."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] == "missing")  # missing keys come last
    field, valid = _locate(first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        near = difflib.get_close_matches(unknown[:100], valid, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        where = ".".join(filter(None, (field, show_key(unknown))))
        return f"{where}: unknown key; {hint}valid: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{field}: missing; it has no default"
    shown = "" if first["type"] == "value_error" else f" = {show(first['input'])}"
    messages = dict.fromkeys(e["msg"] for e in errors if _locate(e["loc"])[0] == field)
    return f"{field}{shown}: {'; or '.join(messages).replace('Value error, ', '')}"


def _locate(loc: Sequence[int | str]) -> tuple[str, list[str]]:
    """Return the dotted field of a pydantic location, and the keys that are valid in its section.

    A union appends the names of its members to the location: these are left out."""
    section: type[BaseModel] = Job
    names: list[str] = []
    for name in map(str, loc):
        fields = {f.alias or n: f for n, f in section.model_fields.items()}
        if name not in fields:
            break
        names.append(name)
        kind = fields[name].annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            break
        section = kind
    return ".".join(names), [f.alias or n for n, f in section.model_fields.items()]
