"""ZeRO-1 through Accelerate and DeepSpeed: the optimizer state sharded over ranks.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..config import Job
from ..layout import Layout
from .base import Engine, Outline

if TYPE_CHECKING:
    from ..models.layers import Layers
    from ..models.losses import Loss

name = "zero1"
summary = "DeepSpeed: optimizer state sharded"


def layout(job: Job, nproc: int) -> Layout:
    """All processes share one copy of what is sharded."""
    return Layout(dp=nproc, shard=nproc)


def check(job: Job, layout: Layout, outline: Outline) -> list[str]:
    """Runs everything; refuses a `ds_config` with keys that are not its to set."""
    from . import _ds_config

    _ds_config.check(job, name)
    return _ds_config.check_precision(job)


def period(job: Job) -> int:
    """Every step is alike."""
    return 1


def build(job: Job, layout: Layout, layers: Layers, loss: Loss) -> Engine:
    """The model under ZeRO-1."""
    from . import _accelerate, _accelerate_engine, _deepspeed

    accumulation = job.micro_batches(name)
    config = _deepspeed.full_config(job, layout, layers, name, job.strategy.zero1.ds_config, 1)
    _deepspeed.prepare_process()
    accelerator, prepared = _accelerate.prepare_zero(
        job, layers, accumulation, config, _deepspeed.keep_masters
    )
    return _accelerate_engine.AccelerateEngine(
        job,
        layout,
        loss,
        accelerator,
        prepared,
        inspect=partial(_deepspeed.inspect_zero, wanted=1),
        gather=_deepspeed.gather_zero,
        scatter=_deepspeed.scatter_zero,
    )
