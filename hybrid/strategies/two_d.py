"""2D: pipeline stages x data-parallel columns on DeepSpeed, ZeRO-0 or ZeRO-1 over the columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engines.protocol import Engine
from ..job.errors import Unsupported
from ..job.schema import Job, TwoD
from ..launch.placement import Placement
from ..layout import Layout, fill_degrees
from ..stages.checks import ModelSummary

if TYPE_CHECKING:
    from ..models.layers import Layers
    from ..models.losses import Loss

name = "2d"
summary = "stages x data-parallel columns; `zero_stage` 0 or 1; parallel.pp x parallel.dp"


def layout(job: Job, nproc: int) -> Layout:
    """`parallel.pp` x `parallel.dp`; left out, two stages and as many columns as that leaves."""
    pp, dp = job.parallel.pp, job.parallel.dp
    if pp is None and dp is None:
        if nproc < 4 or nproc % 2:
            raise Unsupported(
                f"2 stages x 2 or more columns need 4, 6, 8, ... processes, not {nproc}"
            )
        pp = 2
    pp, dp = fill_degrees(nproc, pp, dp, "parallel.pp x parallel.dp")
    if pp < 2 or dp < 2:
        raise Unsupported(f"pp {pp} x dp {dp} has only one axis; pipeline or ddp is that")
    return Layout(pp=pp, dp=dp, **_axis(job.strategy.two_d, dp))


def _axis(settings: TwoD, dp: int) -> dict[str, int]:
    return {"shard": dp} if settings.zero_stage else {"replicate": dp}


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Every stage must get layers with parameters, and tensors that can be passed on."""
    from ..engines.deepspeed_config import check_ds_config, check_fp16
    from ..stages.checks import check_stages

    settings = job.strategy.two_d
    check_ds_config(job, name)
    if settings.zero_stage == 0 and job.train.precision != "fp32":
        raise Unsupported(
            f"strategy.2d.zero_stage = 0 with train.precision = {job.train.precision!r}: DeepSpeed "
            "sums rounded gradients in fp32 under ZeRO-1 only; set strategy.2d.zero_stage = 1"
        )
    return [*check_fp16(job), *check_stages(name, job, layout, summary)]


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """This rank's stage in its column."""
    from ..engines.deepspeed_setup import full_config, prepare_process
    from ..engines.pipeline_deepspeed import StageEngine

    settings = job.strategy.two_d
    stage = settings.zero_stage
    path = settings.ds_config or _file(settings)
    prepare_process(placement)
    config = full_config(job, placement, layers, name, path, stage)
    return StageEngine(job, placement, layers, loss, settings, stage, config)


def _file(settings: TwoD) -> str:
    """The shipped configuration of each of the two ZeRO stages."""
    return name if settings.zero_stage else "pipeline"
