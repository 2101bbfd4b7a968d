"""The job: what is trained, on what, how. A TOML file plus `--set a.b=value`, read strictly.

Every field is documented where it stands. An unknown key, a wrong type or an impossible value
raises `JobError`, whose text is one line naming the field, the value and what is valid. No torch.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)


class JobError(ValueError):
    """The job or the command line is wrong; the message is one line for its author (exit 2)."""


def _no_bool(value: Any) -> Any:
    """A literal 1 would take True."""
    return repr(value) if isinstance(value, bool) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Positive = Annotated[int, Field(ge=1)]
Partition = Literal["uniform", "parameters"] | Annotated[list[Positive], Field(min_length=1)]


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """Options as every rank will read them back from `job.json`."""
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options hold finite numbers, texts, lists and tables: {error}") from None
    return options


Options = Annotated[dict[str, Any], AfterValidator(_storable)]


class Model(_Section):
    """`name`: linear, mlp, or package.module:function; `options`: its keyword arguments."""

    name: str
    options: Options = {}


class Data(_Section):
    """`name`: random, mnist, or package.module:function; `options`: its keyword arguments."""

    name: str
    options: Options = {}


class Optimizer(_Section):
    """Torch's SGD or AdamW. `momentum` is SGD's, `betas` and `eps` are AdamW's."""

    name: Literal["sgd", "adamw"]
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class Schedule(_Section):
    """Learning rate over optimizer steps: linear warm-up, then constant, or down to `min_lr` at the
    end of the run along a line or half a cosine."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    min_lr: float = Field(default=0.0, ge=0)


class Train(_Section):
    """`global_batch`: samples per optimizer step over all ranks. `micro_batches`: pieces each
    data-parallel rank cuts its share into. `epochs` or `steps`: one of them. `clip_norm`: greatest
    global gradient norm, 0 is off. `precision`: fp32 is what this release trains in."""

    global_batch: Positive
    micro_batches: Positive = 1
    epochs: Positive | None = None
    steps: Positive | None = None
    precision: Literal["fp32"] = "fp32"
    clip_norm: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs = {self.epochs}, steps = {self.steps}: give one of the two")
        return self


class Parallel(_Section):
    """Degrees for the strategies with two axes: `pp` x `dp` for 2d, `replicate` x `shard` for fsdp.
    Left out, they follow from --nproc. Strategies with one axis put all processes on it."""

    pp: Positive | None = None
    dp: Positive | None = None
    replicate: Positive | None = None
    shard: Positive | None = None


class StrategySettings(_Section):
    """What every strategy section takes: `micro_batches` overrides the one of [train]."""

    micro_batches: Positive | None = None


class Ddp(StrategySettings):
    """`comm_hook`: how gradients travel (none: as they are). `powersgd_rank`: rank of PowerSGD's
    approximation. `bucket_cap_mb`: MiB of gradients a collective carries."""

    comm_hook: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    powersgd_rank: Positive = 1
    bucket_cap_mb: Positive = 25


class LocalSgd(StrategySettings):
    """`sync_every`: local steps between merges, or "epoch". `emulate_replicas`: one process plays
    that many ranks in turn; the reference that `hybrid compare` holds a real run against."""

    sync_every: Positive | Literal["epoch"] = "epoch"
    emulate_replicas: Positive | None = None


class Fsdp(StrategySettings):
    """`reshard_after_forward`: free gathered parameters between forward and backward (less memory,
    one more all-gather)."""

    reshard_after_forward: bool = True


class Zero(StrategySettings):
    """`ds_config`: a DeepSpeed JSON file in place of the shipped `ds_configs/zeroN.json`."""

    ds_config: str | None = None


class Pipeline(StrategySettings):
    """`partition`: equal numbers of layers, equal parameters, or layers a stage ([2, 1, 1])."""

    partition: Partition = "uniform"
    ds_config: str | None = None


class TwoD(Pipeline):
    """`zero_stage`: 0 replicates the optimizer state over columns, 1 shards it."""

    zero_stage: Annotated[Literal[0, 1], BeforeValidator(_no_bool)] = 1


class Strategies(_Section):
    """Settings of one strategy each: [strategy.NAME]."""

    single: StrategySettings = StrategySettings()
    ddp: Ddp = Ddp()
    local_sgd: LocalSgd = LocalSgd()
    fsdp: Fsdp = Fsdp()
    zero1: Zero = Zero()
    zero2: Zero = Zero()
    zero3: Zero = Zero()
    pipeline: Pipeline = Pipeline()
    two_d: TwoD = Field(default=TwoD(), alias="2d")


class Job(_Section):
    """One job: the same model, data, optimizer and evaluation under every strategy."""

    model: Model
    data: Data
    optimizer: Optimizer
    train: Train
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    strategy: Strategies = Strategies()

    def settings(self, strategy: str) -> StrategySettings:
        """The section of one strategy; its defaults for a strategy that has none."""
        return getattr(self.strategy, "two_d" if strategy == "2d" else strategy, StrategySettings())

    def micro_batches(self, strategy: str) -> int:
        """Micro-batches per data-parallel rank under one strategy."""
        return self.settings(strategy).micro_batches or self.train.micro_batches

    def warnings(self) -> list[str]:
        """Settings that differ from their default and have no effect, a line each."""
        optimizer, schedule, ddp = self.optimizer, self.schedule, self.strategy.ddp
        unused: list[tuple[str, str, str, BaseModel]]
        unused = [("optimizer", key, "name", optimizer) for key in _UNUSED[optimizer.name]]
        if schedule.name == "constant":
            unused.append(("schedule", "min_lr", "name", schedule))
        if ddp.comm_hook != "powersgd":
            unused.append(("strategy.ddp", "powersgd_rank", "comm_hook", ddp))
        return [
            f"{where}.{key} has no effect with {where}.{because} = {getattr(section, because)!r}"
            for where, key, because, section in unused
            if getattr(section, key) != type(section).model_fields[key].default
        ]


_INSTEAD = {"train.steps": "epochs", "train.epochs": "steps"}
_UNUSED = {"sgd": ("betas", "eps"), "adamw": ("momentum",)}


def load_job(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Job:
    """The job in a TOML or JSON file (or in a mapping of the same shape) with overrides on top.

    `overrides` are "a.b=value" texts, the value in TOML or a bare word, or a mapping from "a.b" to
    the value. Raises JobError.
    """
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
    """The mapping in a TOML file, or in a JSON file such as a run's own `job.json`."""
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_bytes().decode()
        data = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}; a job file is needed") from None
    except (ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise JobError(f"{path}: not a {kind} file: {first}") from None
    if not isinstance(data, dict):
        raise JobError(f"{path}: holds a {type(data).__name__}, a job is sections of keys")
    return data


def _parse_pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise JobError(f"--set {text!r}: write a.b=value, such as train.steps=20")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _assign(data: dict[str, Any], key: str, value: Any) -> None:
    if key in _INSTEAD:  # of the two lengths of a run, the override is the one that counts
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
    """The first error of a validation as `field = value: what is wrong; what is valid`."""
    errors = error.errors(include_url=False)
    first = errors[0]
    field, valid = _locate(first["loc"])
    if first["type"] == "extra_forbidden":
        unknown = str(first["loc"][-1])
        near = difflib.get_close_matches(unknown, valid, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{field}.{unknown}: unknown key; {hint}valid: {', '.join(valid)}".lstrip(".")
    if first["type"] == "missing":
        return f"{field}: missing; it has no default"
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    shown = "" if first["type"] == "value_error" else f" = {value}"
    messages = dict.fromkeys(e["msg"] for e in errors if _locate(e["loc"])[0] == field)
    return f"{field}{shown}: {'; or '.join(messages).replace('Value error, ', '')}"


def _locate(loc: Sequence[int | str]) -> tuple[str, list[str]]:
    """The dotted field that a pydantic location lies in, and the keys valid in its section (a union
    appends the names of its members to the location: these are left out)."""
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


def to_dict(job: Job) -> dict[str, Any]:
    """The whole job, defaults written out, as `load_job` takes it back."""
    return job.model_dump(mode="json", by_alias=True, exclude_none=True)


def resolve_lengths(job: Job, num_samples: int) -> Job:
    """The job with lengths in optimizer steps: `train.epochs` and `sync_every = "epoch"` become
    numbers, now that the size of the train set is known."""
    per_epoch = -(-num_samples // job.train.global_batch)
    steps = job.train.steps or job.train.epochs * per_epoch  # type: ignore[operator]
    train = job.train.model_copy(update={"steps": steps, "epochs": None})
    local_sgd = job.strategy.local_sgd
    if local_sgd.sync_every == "epoch":
        local_sgd = local_sgd.model_copy(update={"sync_every": per_epoch})
    strategy = job.strategy.model_copy(update={"local_sgd": local_sgd})
    return job.model_copy(update={"train": train, "strategy": strategy})
