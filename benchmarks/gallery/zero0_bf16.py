"""A strategy of one's own: plain DeepSpeed in bf16 without ZeRO, by DeepSpeed's own defaults.

hybrid compare JOB --strategies benchmarks.gallery.zero0_bf16
"""

from __future__ import annotations

from typing import Any

from hybrid.job.errors import Unsupported
from hybrid.job.schema import Job
from hybrid.launch.placement import Placement
from hybrid.layout import Layout
from hybrid.stages.checks import ModelSummary

name = "benchmarks.gallery.zero0_bf16"
summary = "DeepSpeed without ZeRO, bf16 alone"
CONFIG = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}, "gradient_clipping": 0.0}


def layout(job: Job, nproc: int) -> Layout:
    """Make all processes replicas."""
    return Layout(dp=nproc, replicate=nproc)


def check(job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Refuse every precision but bf16."""
    if job.train.precision != "bf16":
        raise Unsupported(f"train.precision = {job.train.precision!r}: bf16 alone")
    return []


def build(job: Job, placement: Placement, layers: Any, loss: Any) -> Any:
    """Put the model under DeepSpeed."""
    from .plain_engine import PlainEngine

    return PlainEngine(job, placement, layers, loss, CONFIG)
