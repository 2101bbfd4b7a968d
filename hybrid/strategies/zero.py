"""These three strategies are ZeRO-1, 2 and 3, through Accelerate and DeepSpeed.
Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054."""

import dataclasses

from ..engines.deepspeed_config import MODULES, check_fp16, check_saved
from ..engines.refusals import DEEPSPEED_SCALARS, check_cuts, check_parameters
from ..job.known_bad import check_release
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary
from .protocol import Engine, Layers, Loss


@dataclasses.dataclass(frozen=True)
class ZeroStrategy:
    """Makes a `Strategy` of one ZeRO stage."""

    name: str
    summary: str
    stage: int
    modules: tuple[str, ...] = ("hybrid.engines.zero", *MODULES)

    def layout(self, job: Job, nproc: int) -> Layout:
        """Share one copy of what is sharded among all processes."""
        return Layout(dp=nproc, shard=nproc)

    def check(self, job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
        """Refuse what DeepSpeed does, and a DeepSpeed that trains this stage wrongly."""
        check_fp16(job)
        check_saved(job, self.name)
        empty = "ZeRO-3 cannot make pieces of it; make it a buffer" if self.stage == 3 else None
        check_parameters(summary, DEEPSPEED_SCALARS, empty)
        check_cuts(job, self.name, summary, ["flat"])
        return check_release(job, self.name)

    def build(self, job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
        """Put the model under this stage."""
        from ..engines.zero import ZeroEngine

        return ZeroEngine(job, placement, layers, loss, self.name, self.stage)


zero1 = ZeroStrategy("zero1", "DeepSpeed: optimizer state sharded", 1)
zero2 = ZeroStrategy("zero2", "DeepSpeed: optimizer state and gradients sharded", 2)
zero3 = ZeroStrategy("zero3", "DeepSpeed: optimizer state, gradients and parameters sharded", 3)
