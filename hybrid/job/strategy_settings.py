"""This module defines the settings of each strategy: [strategy.NAME] in the job.

It also has the types of number that every section of the job takes. It needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)


class Section(BaseModel):
    """Holds one section of a job; an unknown key or another type is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Pieces = Annotated[int, Field(ge=1, le=2**16)]  # of a batch: each has a list of its samples
Seconds = Annotated[int, Field(ge=1, le=7 * 24 * 3600)]
Partition = Literal["uniform", "parameters"] | Annotated[list[Positive], Field(min_length=1)]


def _no_bool(value: Any) -> Any:
    """Turn True into a text, since a literal 1 would accept it."""
    return repr(value) if isinstance(value, bool) else value


class StrategySettings(Section):
    """Holds what every strategy's section takes."""

    micro_batches: Pieces | None = None  # overrides [train]


class Single(StrategySettings):
    """Sets what a control of `hybrid compare` needs."""

    emulate_ranks: Positive | None = None  # one process plays that many data-parallel ranks
    move_weights: Positive | None = None  # by a rounding after step 0; the seed of the directions


class Ddp(StrategySettings):
    """Sets how gradients travel, and buffers.

    broadcast_buffers: rank 0 sends its buffers to the others before a forward pass, unless no rank
    changed any in the first step (changing), or in any case (always)."""

    comm_hook: Literal["none", "bf16", "fp16", "powersgd"] = "none"  # none: as they are
    powersgd_rank: Positive = 1  # of PowerSGD's approximation
    bucket_cap_mb: Annotated[int, Field(ge=1, le=2**20)] = 25  # MiB of gradients in a collective
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
    # Reduces gradients after each micro-batch, of which a rank keeps its part. Else once a step,
    # for which each rank holds whole gradients: with four micro-batches, a quarter of the bytes.
    sync_each_batch: bool = True


class Zero(StrategySettings):
    """Names a DeepSpeed JSON file in place of the shipped `ds_configs/zeroN.json`."""

    ds_config: str | None = None


class Zero2(Zero):
    """Also sets when gradients are reduced, where a step has several micro-batches.

    reduce_once: in fp32, once a step, for which each rank holds whole gradients, as under zero1.
    Else after each micro-batch, of which a rank keeps its part: with four, four times the bytes."""

    reduce_once: bool = True


class Stages(StrategySettings):
    """Sets how layers are cut into stages.

    `partition`: equal numbers of layers that have parameters (uniform), equal parameters, or the
    layers of each stage ([2, 1, 1])."""

    partition: Partition = "uniform"
    ds_config: str | None = None


class Pipeline(Stages):
    """Also sets what passes tensors along the stages, and in which order.

    engine: DeepSpeed's pipeline engine, or torch.distributed.pipelining. schedule: all forward
    passes before the backward ones (gpipe, by torch alone), or each as soon as it can be (1f1b)."""

    engine: Literal["deepspeed", "torch"] = "deepspeed"
    schedule: Literal["1f1b", "gpipe"] = "1f1b"

    @field_validator("schedule")
    @classmethod
    def _has_that_schedule(cls, schedule: str, given: ValidationInfo) -> str:
        if schedule != "1f1b" and given.data.get("engine") == "deepspeed":
            raise ValueError(f"{schedule!r}: engine = 'deepspeed' runs 1f1b alone; valid: '1f1b'")
        return schedule


class TwoD(Stages):
    """Sets a pipeline with data-parallel columns."""

    # 0 replicates the optimizer state over the columns, 1 shards it.
    zero_stage: Annotated[Literal[0, 1], BeforeValidator(_no_bool)] = 1


class Strategies(Section):
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
