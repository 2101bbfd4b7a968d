"""Pipeline parallelism on DeepSpeed: the layers cut into stages, micro-batches passed along them.

One data-parallel column; `2d` has more. Huang et al. 2019, https://arxiv.org/abs/1811.06965.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engines.protocol import Engine
from ..job.errors import Unsupported
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary

if TYPE_CHECKING:
    from ..models.layers import Layers
    from ..models.losses import Loss

name = "pipeline"
summary = "layers over stages; `partition` uniform, parameters or [layers, ...]; micro-batches"


def layout(job: Job, nproc: int) -> Layout:
    """All processes are stages of one column."""
    if nproc < 2:
        raise Unsupported("a pipeline needs at least 2 processes, one a stage")
    return Layout(pp=nproc)


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Every stage must get layers with parameters, and tensors that can be passed on."""
    from ..engines.deepspeed_config import check_ds_config, check_fp16
    from ..stages.checks import check_stages

    check_ds_config(job, name)
    return [*check_fp16(job), *check_stages(name, job, layout, summary)]


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """This rank's stage."""
    from ..engines.deepspeed_setup import full_config, prepare_process
    from ..engines.pipeline_deepspeed import StageEngine

    settings = job.strategy.pipeline
    prepare_process(placement)
    config = full_config(job, placement, layers, name, settings.ds_config, 0)
    return StageEngine(job, placement, layers, loss, settings, 0, config)
