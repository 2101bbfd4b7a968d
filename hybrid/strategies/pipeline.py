"""This strategy is a pipeline: layers over stages, micro-batches passed along them.

It has one data-parallel column; `2d` has more. Huang et al. 2019, https://arxiv.org/abs/1811.06965.
DeepSpeed runs it, or torch.distributed.pipelining.
"""

from importlib.metadata import version

from packaging.version import Version

from ..engines.deepspeed_config import MODULES, check_fp16
from ..engines.refusals import DEEPSPEED_SCALARS, check_cuts, check_parameters
from ..job.errors import JobError, Unsupported
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..stages.checks import ModelSummary, check_stages
from .protocol import Engine, Layers, Loss

OLDEST = Version("2.13")  # of torch: 2.11 raises for a tensor without gradient; 2.12 was not tried

name = "pipeline"
summary = "layers over stages; `engine` deepspeed or torch, `schedule`; `partition`; micro-batches"


def modules(job: Job | None) -> tuple[str, ...]:
    """Name what the ranks import: DeepSpeed's, where that runs the stages."""
    if job and job.stages_by_torch(name):
        return ("hybrid.engines.pipeline_torch",)
    return ("hybrid.engines.pipeline_deepspeed", *MODULES)


def layout(job: Job, nproc: int) -> Layout:
    """Make all processes stages of one column."""
    if nproc < 2:
        raise Unsupported("a pipeline needs at least 2 processes, one a stage")
    return Layout(pp=nproc)


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Require that every stage gets layers with parameters, and tensors that can be passed on."""
    if job.stages_by_torch(name):
        _check_torch(job, layout)
        flat = []
    else:
        check_fp16(job)
        check_parameters(summary, DEEPSPEED_SCALARS)
        # Rounded parameters run under ZeRO-1.
        flat = [] if job.train.precision == "fp32" else ["flat", "groups"]
    check_cuts(job, name, summary, ["stages", *flat])
    return check_stages(name, job, layout, summary)


def _check_torch(job: Job, layout: Layout) -> None:
    """Refuse what torch's schedules cannot run, and a file that nothing would read."""
    settings, number = job.strategy.pipeline, job.micro_batches(name)
    if Version(version("torch")) < OLDEST:
        raise Unsupported(
            f"strategy.pipeline.engine = 'torch': torch {version('torch')} is installed, and this "
            f"needs {OLDEST} or later; set engine = 'deepspeed'"
        )
    if settings.ds_config is not None:
        raise JobError(
            f"strategy.pipeline.ds_config = {settings.ds_config!r}: engine = 'torch' runs no "
            "DeepSpeed, which alone reads it; valid: leave it out, or engine = 'deepspeed'"
        )
    if settings.schedule == "1f1b" and number < layout.pp:
        raise Unsupported(
            f"torch's 1f1b needs as many micro-batches as stages, {layout.pp}, not {number}: set "
            f"strategy.pipeline.micro_batches = {layout.pp} or schedule = 'gpipe'"
        )


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Make this rank's stage."""
    if job.stages_by_torch(name):
        from ..engines.pipeline_torch import TorchStage

        return TorchStage(job, placement, layers, loss, name)
    from ..engines.pipeline_deepspeed import StageEngine

    return StageEngine(job, placement, layers, loss, name, zero_stage=0)
