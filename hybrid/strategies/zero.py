"""ZeRO-1, 2 and 3 through Accelerate and DeepSpeed: three instances of one strategy.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..engines.deepspeed_config import check_ds_config, check_fp16
from ..job.schema import Job, Zero
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary

if TYPE_CHECKING:
    from ..engines.protocol import Engine
    from ..models.layers import Layers
    from ..models.losses import Loss


@dataclasses.dataclass(frozen=True)
class ZeroStrategy:
    """One ZeRO stage as a `Strategy`."""

    name: str
    summary: str
    stage: int

    def layout(self, job: Job, nproc: int) -> Layout:
        """All processes share one copy of what is sharded."""
        return Layout(dp=nproc, shard=nproc)

    def check(self, job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
        """Refuses a `ds_config` with keys that the job owns, and fp16 where DeepSpeed does."""
        check_ds_config(job, self.name)
        return check_fp16(job)

    def build(self, job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
        """The model under this stage."""
        from ..engines.accelerator import prepare_zero
        from ..engines.deepspeed_setup import (
            add_biases_before_rounding,
            full_config,
            prepare_process,
            restore_fp32_masters,
        )
        from ..engines.zero import ZeroEngine

        settings = job.settings(self.name)
        assert isinstance(settings, Zero)
        config = full_config(job, placement, layers, self.name, settings.ds_config, self.stage)
        prepare_process(placement)
        if self.stage == 3:
            add_biases_before_rounding()
        accelerator, prepared = prepare_zero(
            job, placement, layers, job.micro_batches(self.name), config, restore_fp32_masters
        )
        return ZeroEngine(job, placement, loss, accelerator, prepared, self.stage)


zero1 = ZeroStrategy("zero1", "DeepSpeed: optimizer state sharded", 1)
zero2 = ZeroStrategy("zero2", "DeepSpeed: optimizer state and gradients sharded", 2)
zero3 = ZeroStrategy("zero3", "DeepSpeed: optimizer state, gradients and parameters sharded", 3)
