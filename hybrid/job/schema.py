"""This module defines the job: what is trained, on what, how. `hybrid.job.file` reads one.

Every field is documented where it stands. An unknown key, a wrong type or an impossible value is
refused; nothing is converted or ignored. The module needs no torch."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _no_bool(value: Any) -> Any:
    """Turn True into a text, since a literal 1 would accept it."""
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
    """Return options that every rank will read back from `job.json`; refuse others."""
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


class _Named(_Section):
    """Names a function and the keyword arguments to call it with."""

    name: str
    options: Options = {}


class Model(_Named):
    """Names the model: linear, mlp, gpt, hf:NAME_OR_PATH, or package.module:function."""


class Data(_Named):
    """Names the data: random, mnist, text, or package.module:function."""


class Optimizer(_Section):
    """Chooses torch's SGD or AdamW and sets it."""

    name: Literal["sgd", "adamw"]
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)  # for sgd
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(  # for adamw
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    eps: float = Field(default=1e-8, gt=0)  # for adamw
    weight_decay: float = Field(default=0.0, ge=0)
    no_decay: list[Literal["norms", "biases", "embeddings"]] = []  # left out by weight_decay


class Schedule(_Section):
    """Sets how the learning rate moves over optimizer steps, after a linear warm-up.

    It stays constant, or falls along a line or half a cosine to `min_lr` at the end of the run."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    min_lr: float = Field(default=0.0, ge=0)


class Train(_Section):
    """Sets the training loop; exactly one of `epochs` and `steps` is given."""

    global_batch: Positive  # samples per optimizer step over all ranks
    micro_batches: Positive = 1  # pieces each data-parallel rank cuts its share into
    epochs: Positive | None = None
    steps: Positive | None = None  # optimizer steps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # see docs/precision.md
    clip_norm: float = Field(default=0.0, ge=0)  # greatest global gradient norm; 0 is off
    seed: Count = 0
    activation_checkpointing: bool = False  # computes activations again in backward, keeps none
    compile: bool = False  # applies torch.compile to each layer
    eval_every: Count = 0  # steps between evaluations, also before training; 0: at the end alone

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs = {self.epochs}, steps = {self.steps}: give one of the two")
        return self


class Parallel(_Section):
    """Sets the degrees of strategies with two axes: pp x dp for 2d, replicate x shard for fsdp.

    Left out, they follow from --nproc. Strategies with one axis put all processes on it."""

    pp: Positive | None = None
    dp: Positive | None = None
    replicate: Positive | None = None
    shard: Positive | None = None


class Log(_Section):
    """Says how often the ranks' numbers are read, and names trackers besides `steps.jsonl`.

    every: they are read once in so many steps; the gradient norm of the others is taken only where
    it is clipped. A comparison reads every step. The trackers are those that Accelerate knows, such
    as tensorboard; each needs its own package."""

    every: Positive = 1
    trackers: list[str] = []


class Launch(_Section):
    """Sets after how many seconds a run gives up, and which releases may run.

    allow_known_bad: runs a release of DeepSpeed that is known to train wrongly, which is otherwise
    refused."""

    start_timeout_s: Seconds = 60  # on ranks that do not start or meet
    collective_timeout_s: Seconds = 300  # on a rank that others wait for in a collective
    allow_known_bad: bool = False


class StrategySettings(_Section):
    """Holds what every strategy's section takes."""

    micro_batches: Positive | None = None  # overrides [train]


class Single(StrategySettings):
    """Sets what a control of `hybrid compare` needs."""

    move_weights: Positive | None = None  # by a rounding after step 0; the seed of the directions


class Ddp(StrategySettings):
    """Sets how gradients travel, and buffers.

    broadcast_buffers: rank 0 sends its buffers to the others before a forward pass, unless no rank
    changed any in the first step (changing), or in any case (always)."""

    comm_hook: Literal["none", "bf16", "fp16", "powersgd"] = "none"  # none: as they are
    powersgd_rank: Positive = 1  # of PowerSGD's approximation
    bucket_cap_mb: Positive = 25  # MiB of gradients in a collective
    broadcast_buffers: Literal["changing", "always"] = "changing"


class LocalSgd(StrategySettings):
    """Sets how often the ranks' parameters are averaged."""

    sync_every: Positive | Literal["epoch"] = "epoch"  # local steps between two averages
    emulate_replicas: Positive | None = None  # one process plays that many ranks in turn
    move_weights: Positive | None = None  # as of `single`; for an emulation alone


class Fsdp(StrategySettings):
    """Sets how FSDP2 shards."""

    # Frees gathered parameters between forward and backward: less memory, one more all-gather.
    reshard_after_forward: bool = True


class Zero(StrategySettings):
    """Names a DeepSpeed JSON file in place of the shipped `ds_configs/zeroN.json`."""

    ds_config: str | None = None


class Zero2(Zero):
    """Also sets when gradients are reduced, where a step has several micro-batches.

    reduce_once: in fp32, once a step, for which each rank holds whole gradients, as under zero1.
    Else after each micro-batch, of which a rank keeps its part: with four, four times the bytes."""

    reduce_once: bool = True


class Pipeline(StrategySettings):
    """Sets how layers are cut into stages.

    `partition`: equal numbers of layers that have parameters (uniform), equal parameters, or the
    layers of each stage ([2, 1, 1])."""

    partition: Partition = "uniform"
    ds_config: str | None = None


class TwoD(Pipeline):
    """Sets a pipeline with data-parallel columns."""

    # 0 replicates the optimizer state over the columns, 1 shards it.
    zero_stage: Annotated[Literal[0, 1], BeforeValidator(_no_bool)] = 1


class Strategies(_Section):
    """Holds the settings of each strategy: [strategy.NAME]."""

    single: Single = Single()
    ddp: Ddp = Ddp()
    local_sgd: LocalSgd = LocalSgd()
    fsdp: Fsdp = Fsdp()
    zero1: Zero = Zero()
    zero2: Zero2 = Zero2()
    zero3: Zero = Zero()
    pipeline: Pipeline = Pipeline()
    two_d: TwoD = Field(default=TwoD(), alias="2d")


class Variant(_Section):
    """Makes a strategy with other settings a row of its own in a comparison: [variant.NAME].

    Besides these keys it takes those of [strategy.STRATEGY], which `hybrid.job.variants` checks."""

    model_config = ConfigDict(extra="allow")

    strategy: str
    pp: Positive | None = None  # degrees, in place of those in [parallel]
    dp: Positive | None = None
    replicate: Positive | None = None
    shard: Positive | None = None


class Job(_Section):
    """Holds one job: the same model, data, optimizer and evaluation under every strategy."""

    model: Model
    data: Data
    optimizer: Optimizer
    train: Train
    schedule: Schedule = Schedule()
    log: Log = Log()
    launch: Launch = Launch()
    parallel: Parallel = Parallel()
    strategy: Strategies = Strategies()
    variant: dict[str, Variant] = {}
    proxy: Options = {}  # overrides that make a small job of this one

    def settings(self, strategy: str) -> StrategySettings:
        """Return the section of one strategy, or the defaults if it has no section."""
        return getattr(self.strategy, "two_d" if strategy == "2d" else strategy, StrategySettings())

    def micro_batches(self, strategy: str) -> int:
        """Return the micro-batches per data-parallel rank under one strategy."""
        return self.settings(strategy).micro_batches or self.train.micro_batches

    def warnings(self) -> list[str]:
        """Return a line for each setting that differs from its default and has no effect."""
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
    """Return the job with `train.epochs` and `sync_every = "epoch"` as numbers of optimizer steps.

    `num_samples`: the size of the train set."""
    per_epoch = -(-num_samples // job.train.global_batch)
    steps = job.train.steps or job.train.epochs * per_epoch  # type: ignore[operator]
    train = job.train.model_copy(update={"steps": steps, "epochs": None})
    local_sgd = job.strategy.local_sgd
    if local_sgd.sync_every == "epoch":
        local_sgd = local_sgd.model_copy(update={"sync_every": per_epoch})
    strategy = job.strategy.model_copy(update={"local_sgd": local_sgd})
    return job.model_copy(update={"train": train, "strategy": strategy})
