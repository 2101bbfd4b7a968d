"""This strategy is 2D on DeepSpeed: pipeline stages x data-parallel columns.

Over the columns it runs ZeRO-0 or ZeRO-1."""

from ..engines.deepspeed_config import MODULES, check_fp16
from ..engines.refusals import DEEPSPEED_SCALARS, check_cuts, check_parameters
from ..job.errors import Unsupported
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout, fill_degrees
from ..stages.checks import ModelSummary, check_stages
from .protocol import Engine, Layers, Loss

name = "2d"
summary = "stages x data-parallel columns; `zero_stage` 0 or 1; parallel.pp x parallel.dp"
modules = ("hybrid.engines.pipeline_deepspeed", *MODULES)


def layout(job: Job, nproc: int) -> Layout:
    """Arrange `parallel.pp` x `parallel.dp`; left out, two stages and as many columns as fit."""
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
    axis = "shard" if job.strategy.two_d.zero_stage else "replicate"
    return Layout(pp=pp, dp=dp, **{axis: dp})


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Require that every stage gets layers with parameters, and tensors that can be passed on."""
    if job.strategy.two_d.zero_stage == 0 and job.train.precision != "fp32":
        raise Unsupported(
            f"strategy.2d.zero_stage = 0 with train.precision = {job.train.precision!r}: DeepSpeed "
            "sums rounded gradients in fp32 under ZeRO-1 only; set strategy.2d.zero_stage = 1"
        )
    check_fp16(job)
    check_parameters(summary, DEEPSPEED_SCALARS)
    flat = ["flat", "groups"] if job.strategy.two_d.zero_stage else []
    check_cuts(job, name, summary, ["stages", *flat])
    return check_stages(name, job, layout, summary)


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Make this rank's stage in its column."""
    from ..engines.pipeline_deepspeed import StageEngine

    return StageEngine(job, placement, layers, loss, name, job.strategy.two_d.zero_stage)
