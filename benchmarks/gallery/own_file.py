"""A strategy of one's own: plain DeepSpeed by a file of the user's, which says nothing of clipping.

hybrid compare JOB --strategies benchmarks.gallery.own_file
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hybrid.job.schema import Job
from hybrid.launch.placement import Placement
from hybrid.layout import Layout

name = "benchmarks.gallery.own_file"
summary = "DeepSpeed by own_file.json as it is"
FILE = Path(__file__).parent / "own_file.json"


def layout(job: Job, nproc: int) -> Layout:
    """Share the optimizer state among all processes."""
    return Layout(dp=nproc, shard=nproc)


def build(job: Job, placement: Placement, layers: Any, loss: Any) -> Any:
    """Put the model under DeepSpeed."""
    from .plain_engine import PlainEngine

    return PlainEngine(job, placement, layers, loss, json.loads(FILE.read_text()))
