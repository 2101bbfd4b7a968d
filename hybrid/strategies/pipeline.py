"""This strategy is a DeepSpeed pipeline: layers over stages, micro-batches passed along them.

It has one data-parallel column; `2d` has more. Huang et al. 2019, https://arxiv.org/abs/1811.06965.
"""

from ..engines.deepspeed_config import MODULES, check_fp16
from ..engines.refusals import DEEPSPEED_SCALARS, check_cuts, check_parameters
from ..job.errors import Unsupported
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary, check_stages
from .protocol import Engine, Layers, Loss

name = "pipeline"
summary = "layers over stages; `partition` uniform, parameters or [layers, ...]; micro-batches"
modules = ("hybrid.engines.pipeline_deepspeed", *MODULES)


def layout(job: Job, nproc: int) -> Layout:
    """Make all processes stages of one column."""
    if nproc < 2:
        raise Unsupported("a pipeline needs at least 2 processes, one a stage")
    return Layout(pp=nproc)


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Require that every stage gets layers with parameters, and tensors that can be passed on."""
    check_fp16(job)
    check_parameters(summary, DEEPSPEED_SCALARS)
    flat = [] if job.train.precision == "fp32" else ["flat", "groups"]  # it runs under ZeRO-1 then
    check_cuts(job, name, summary, ["stages", *flat])
    return check_stages(name, job, layout, summary)


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Make this rank's stage."""
    from ..engines.pipeline_deepspeed import StageEngine

    return StageEngine(job, placement, layers, loss, name, zero_stage=0)
