"""Pipeline parallelism on DeepSpeed: the layers cut into stages, micro-batches passed along them.

One data-parallel column; `2d` has more. Huang et al. 2019, https://arxiv.org/abs/1811.06965.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Job
from ..layout import Layout
from .base import Engine, Outline, Unsupported

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


def check(job: Job, layout: Layout, outline: Outline) -> list[str]:
    """Every stage must get layers with parameters, and tensors that can be passed on."""
    from . import _ds_config
    from ._partition import check_stages

    _ds_config.check(job, name)
    return [*_ds_config.check_precision(job), *check_stages(name, job, layout, outline)]


def period(job: Job) -> int:
    """Every step is alike."""
    return 1


def build(job: Job, layout: Layout, layers: Layers, loss: Loss) -> Engine:
    """This rank's stage."""
    from . import _deepspeed, _stages

    settings = job.strategy.pipeline
    _deepspeed.prepare_process()
    config = _deepspeed.full_config(job, layout, layers, name, settings.ds_config, 0)
    return _stages.StageEngine(job, layout, layers, loss, settings, 0, config)
