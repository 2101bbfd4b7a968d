"""The job: what is trained, on what, how. `hybrid.job.file` reads one.

Every field is documented where it stands. An unknown key, a wrong type or an impossible value is
refused; nothing is converted or ignored. No torch.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)


def _no_bool(value: Any) -> Any:
    """A literal 1 would take True."""
    return repr(value) if isinstance(value, bool) else value


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


MAX_DEPTH = 100  # levels of options; pydantic writes 255 and no more
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Seconds = Annotated[int, Field(ge=1, le=7 * 24 * 3600)]
Partition = Literal["uniform", "parameters"] | Annotated[list[Positive], Field(min_length=1)]


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """Options as every rank will read them back from `job.json`."""
    level: list[Any] = [options]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise ValueError(f"options are nested more than {MAX_DEPTH} levels deep")
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options hold finite numbers, texts, lists and tables: {error}") from None
    return options


Options = Annotated[dict[str, Any], AfterValidator(_storable)]


class Model(_Section):
    """`name`: linear, mlp, gpt, hf:NAME_OR_PATH, or package.module:function; `options`: its keyword
    arguments."""

    name: str
    options: Options = {}


class Data(_Section):
    """`name`: random, mnist, text, or package.module:function; `options`: its keyword arguments."""

    name: str
    options: Options = {}


class Optimizer(_Section):
    """Torch's SGD or AdamW. `momentum` is SGD's, `betas` and `eps` are AdamW's. `no_decay`: kinds
    of parameters that `weight_decay` leaves out."""

    name: Literal["sgd", "adamw"]
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    no_decay: list[Literal["norms", "biases", "embeddings"]] = []


class Schedule(_Section):
    """Learning rate over optimizer steps: linear warm-up, then constant, or down to `min_lr` at the
    end of the run along a line or half a cosine."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    min_lr: float = Field(default=0.0, ge=0)


class Train(_Section):
    """`global_batch`: samples per optimizer step over all ranks. `micro_batches`: pieces each
    data-parallel rank cuts its share into. `epochs` or `steps`: one of them. `clip_norm`: greatest
    global gradient norm, 0 is off. `precision`: what layers compute in; README.md has its whole
    meaning. `activation_checkpointing`: compute each layer's activations again in backward
    instead of keeping them. `compile`: torch.compile each layer. `eval_every`: optimizer steps
    between evaluations, the first before training; 0: at the end alone."""

    global_batch: Positive
    micro_batches: Positive = 1
    epochs: Positive | None = None
    steps: Positive | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    clip_norm: float = Field(default=0.0, ge=0)
    seed: Count = 0
    activation_checkpointing: bool = False
    compile: bool = False
    eval_every: Count = 0

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


class Log(_Section):
    """`trackers`: where steps go besides `steps.jsonl`; names that Accelerate knows, such as
    tensorboard, each with its own package installed."""

    trackers: list[str] = []


class Launch(_Section):
    """Seconds until a run gives up: `start_timeout_s` on ranks that do not start or meet,
    `collective_timeout_s` on a rank that others wait for in a collective."""

    start_timeout_s: Seconds = 60
    collective_timeout_s: Seconds = 300


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
    """`partition`: equal numbers of layers that have parameters, equal parameters, or layers a
    stage ([2, 1, 1])."""

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
    log: Log = Log()
    launch: Launch = Launch()
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
        if optimizer.weight_decay == 0:
            unused.append(("optimizer", "no_decay", "weight_decay", optimizer))
        if schedule.name == "constant":
            unused.append(("schedule", "min_lr", "name", schedule))
        if ddp.comm_hook != "powersgd":
            unused.append(("strategy.ddp", "powersgd_rank", "comm_hook", ddp))
        return [
            f"{where}.{key} has no effect with {where}.{because} = {getattr(section, because)!r}"
            for where, key, because, section in unused
            if getattr(section, key) != type(section).model_fields[key].default
        ]


_UNUSED = {"sgd": ("betas", "eps"), "adamw": ("momentum",)}


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
