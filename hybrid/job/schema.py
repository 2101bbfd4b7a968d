"""This module defines the job: what is trained, on what, how. `hybrid.job.file` reads one.

Every field is documented where it stands. An unknown key, a wrong type or an impossible value is
refused; nothing is converted or ignored. The module needs no torch."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .errors import JobError
from .recovery import Checkpoint, Guard
from .strategy_settings import (
    Count,
    Pieces,
    Positive,
    Seconds,
    Section,
    Strategies,
    StrategySettings,
)

EVALUATED = ("loss", "accuracy", "perplexity")  # what an evaluation has, besides the job's metrics
MAX_DEPTH = 100  # levels of options; pydantic writes 255 and no more


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


class _Named(Section):
    """Names a function and the keyword arguments to call it with."""

    name: str
    options: Options = Field(default={})


class Model(_Named):
    """Names the model: linear, mlp, gpt, hf:NAME_OR_PATH, or package.module:function."""

    weights: str | None = None  # a path: the weights to start from (docs/checkpoints.md)
    on_meta: bool = False  # each rank makes the first values of what it holds alone


class Data(_Named):
    """Names the data: random, mnist, text, or package.module:function."""

    workers: Count = 0  # processes of each rank that load its coming batches; 0: the rank itself


def _known_or_path(*known: str) -> AfterValidator:
    """Allow one of some names, or the import path of a user's own function."""

    def check(name: str) -> str:
        module, _, function = name.partition(":")
        if name not in known and not (module and function.isidentifier()):
            valid = f"valid: {', '.join(known)}, package.module:function"
            raise PydanticCustomError("name", "{valid}", {"valid": valid})
        return name

    return AfterValidator(check)


class Optimizer(Section):
    """Chooses torch's SGD or AdamW, or an optimizer by import path, and sets it."""

    name: Annotated[str, _known_or_path("sgd", "adamw")]
    options: Options = Field(default={})  # for one by import path: its keyword arguments
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)  # for sgd
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(  # for adamw
        default=[0.9, 0.999], min_length=2, max_length=2
    )
    eps: float = Field(default=1e-8, gt=0)  # for adamw
    weight_decay: float = Field(default=0.0, ge=0)
    # What weight_decay leaves out.
    no_decay: list[Literal["norms", "biases", "embeddings"]] = Field(default=[])


class Schedule(Section):
    """Sets how the learning rate moves over optimizer steps, after a linear warm-up.

    It stays constant, or falls along a line or half a cosine to `min_lr` at the end of the run. A
    function by import path gives the factor of `optimizer.lr` for each step, and has no warm-up."""

    name: Annotated[str, _known_or_path("constant", "linear", "cosine")] = "constant"
    options: Options = Field(default={})  # for one by import path: its keyword arguments
    warmup_steps: Count = 0
    min_lr: float = Field(default=0.0, ge=0)


class Train(Section):
    """Sets the training loop; exactly one of `epochs` and `steps` is given."""

    global_batch: Positive  # samples per optimizer step over all ranks
    micro_batches: Pieces = 1  # pieces each data-parallel rank cuts its share into
    epochs: Positive | None = None
    steps: Positive | None = None  # optimizer steps
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # see docs/precision.md
    clip_norm: float = Field(default=0.0, ge=0)  # greatest global gradient norm; 0 is off
    seed: Count = 0
    activation_checkpointing: bool = False  # computes activations again in backward, keeps none
    compile: bool = False  # applies torch.compile to each layer
    metrics: list[str] = Field(default=[])  # package.module:function, for the evaluation
    eval_every: Count = 0  # steps between evaluations, also before training; 0: at the end alone
    eval_batches: Positive | None = None  # of the test set, the first ones; left out: all

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"epochs = {self.epochs}, steps = {self.steps}: give one of the two")
        return self


class Parallel(Section):
    """Sets the degrees of strategies with two axes: pp x dp for 2d, replicate x shard for fsdp.

    Left out, they follow from --nproc. Strategies with one axis put all processes on it."""

    pp: Positive | None = None
    dp: Positive | None = None
    replicate: Positive | None = None
    shard: Positive | None = None


class Log(Section):
    """Says how often the ranks' numbers are read, and names trackers besides `steps.jsonl`.

    every: they are read once in so many steps. The gradient norm of the others is taken only where
    it is clipped, and local SGD's drift only in the first merge after each. A comparison reads
    every step. The trackers are those that Accelerate knows, such as tensorboard; each needs its
    own package."""

    every: Positive = 1
    trackers: list[str] = Field(default=[])


class Launch(Section):
    """Sets after how many seconds a run gives up, on what it runs, and which releases may run.

    device: auto takes GPUs where a host has any, one for each rank. allow_known_bad: runs a release
    of DeepSpeed that is known to train wrongly, which is otherwise refused. trust_pickle: reads
    `model.weights` also where they are pickled, by a loader that runs no code."""

    start_timeout_s: Seconds = 60  # on ranks that do not start or meet
    setup_timeout_s: Seconds = 1800  # on a rank that others wait for, but for in a step
    collective_timeout_s: Seconds = 300  # on a rank that others wait for in a step
    device: Literal["auto", "cpu", "cuda"] = "auto"
    allow_known_bad: bool = False
    trust_pickle: bool = False


class Variant(Section):
    """Makes a strategy with other settings a row of its own in a comparison: [variant.NAME].

    Besides these keys it takes those of [strategy.STRATEGY], which `hybrid.job.variants` checks."""

    model_config = ConfigDict(extra="allow")

    strategy: str
    pp: Positive | None = None  # degrees, in place of those in [parallel]
    dp: Positive | None = None
    replicate: Positive | None = None
    shard: Positive | None = None


class Job(Section):
    """Holds one job: the same model, data, optimizer and evaluation under every strategy."""

    model: Model
    data: Data
    optimizer: Optimizer
    train: Train
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard | None = None  # left out: a step that is not finite ends the run one step later
    log: Log = Log()
    launch: Launch = Launch()
    parallel: Parallel = Parallel()
    strategy: Strategies = Strategies()
    variant: dict[str, Variant] = Field(default={})
    proxy: Options = Field(default={})  # overrides that make a small job of this one

    @field_validator("guard")
    @classmethod
    def _has_what_to_go_back_to(cls, guard: Guard | None, given: ValidationInfo) -> Guard | None:
        for key in ("non_finite", "on_spike"):
            every = getattr(given.data.get("checkpoint"), "every", None)
            if getattr(guard, key, None) == "roll_back" and every is None:
                why = f"{key} = 'roll_back' goes back to a checkpoint, and there are none"
                raise ValueError(f"{why}; valid: stop, skip, or checkpoint.every = N")
        return guard

    def settings(self, strategy: str) -> StrategySettings:
        """Return the section of one strategy, or the defaults if it has no section."""
        return getattr(self.strategy, "two_d" if strategy == "2d" else strategy, StrategySettings())

    def stages_by_torch(self, strategy: str) -> bool:
        """Tell whether torch runs the stages of a strategy, and not DeepSpeed."""
        return getattr(self.settings(strategy), "engine", None) == "torch"

    def micro_batches(self, strategy: str) -> int:
        """Return the micro-batches per data-parallel rank under one strategy."""
        return self.settings(strategy).micro_batches or self.train.micro_batches

    def warnings(self) -> list[str]:
        """Return a line for each setting that differs from its default and has no effect."""
        optimizer, schedule, ddp = self.optimizer, self.schedule, self.strategy.ddp
        unused: list[tuple[str, str, str, BaseModel]]
        keys = _UNUSED.get(optimizer.name, ("momentum", "betas", "eps"))
        unused = [("optimizer", key, "name", optimizer) for key in keys]
        if optimizer.weight_decay == 0:
            unused.append(("optimizer", "no_decay", "weight_decay", optimizer))
        keys = _UNUSED.get(schedule.name, ("warmup_steps", "min_lr"))
        unused += [("schedule", key, "name", schedule) for key in keys]
        if ddp.comm_hook != "powersgd":
            unused.append(("strategy.ddp", "powersgd_rank", "comm_hook", ddp))
        if self.guard and not self.guard.spike_factor:
            unused += [("guard", key, "spike_factor", self.guard) for key in ("window", "on_spike")]
        warned = [*self.checkpoint.warnings(), *_others(self)]
        return warned + [
            f"{where}.{key} has no effect with {where}.{because} = {getattr(section, because)!r}"
            for where, key, because, section in unused
            if getattr(section, key) != type(section).model_fields[key].default
        ]


def _others(job: Job) -> list[str]:
    """Return a line for each setting that another one takes the effect of, by its value."""
    schedule, guard, found = job.schedule, job.guard, list[str]()
    if schedule.name in ("linear", "cosine") and schedule.min_lr >= job.optimizer.lr:
        rises = "is no less" if schedule.min_lr == job.optimizer.lr else "is more, so that it rises"
        text = f"schedule.min_lr = {schedule.min_lr}: optimizer.lr = {job.optimizer.lr} falls to it"
        found.append(f"{text}, and it {rises}; valid: less than optimizer.lr")
    if (
        guard
        and guard.max_in_a_row != Guard.model_fields["max_in_a_row"].default
        and guard.non_finite == guard.on_spike == "stop"
    ):
        found.append("guard.max_in_a_row has no effect where the first such step ends the run")
    if job.launch.trust_pickle and job.model.weights is None:
        found.append("launch.trust_pickle has no effect without model.weights")
    return found


# By the name of an optimizer or a schedule; one by import path has options alone.
_UNUSED = {
    "sgd": ("betas", "eps", "options"),
    "adamw": ("momentum", "options"),
    "constant": ("min_lr", "options"),
    **dict.fromkeys(("linear", "cosine"), ("options",)),
}


def resolve_lengths(job: Job, num_samples: int) -> Job:
    """Return the job with `train.epochs` and `sync_every = "epoch"` as numbers of optimizer steps.

    `num_samples`: the size of the train set. Raises JobError where the steps are too many."""
    per_epoch = -(-num_samples // job.train.global_batch)
    steps = job.train.steps or job.train.epochs * per_epoch  # type: ignore[operator]
    if steps >= 2**63:
        most = (2**63 - 1) // per_epoch
        raise JobError(f"train.epochs = {job.train.epochs}: too many steps; valid: 1 to {most}")
    train = job.train.model_copy(update={"steps": steps, "epochs": None})
    local_sgd = job.strategy.local_sgd
    if local_sgd.sync_every == "epoch":
        local_sgd = local_sgd.model_copy(update={"sync_every": per_epoch})
    strategy = job.strategy.model_copy(update={"local_sgd": local_sgd})
    return job.model_copy(update={"train": train, "strategy": strategy})
