"""This package trains one job under every parallel strategy, and compares results and costs.

It first proves that the runs computed the same, and then shows what each costs.

    job = hybrid.load_job("launch/jobs/mnist.toml", ["train.steps=20"])
    record = hybrid.train(job, "single")            # one run in this process
    comparison = hybrid.compare(job, nproc=4)       # every strategy, each on processes of its own

Both take functions in place of those that the job names: `hybrid.compare(job, model=build)`.
`open_engine` gives the engine alone, for people who keep their own loop. `import hybrid` does not
import torch."""

from __future__ import annotations

import importlib

# No `typing` yet: `hybrid.__main__` first sees to it that no file of the user's hides a library's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .comparison.session import compare
    from .data import build_data
    from .data.batches import BatchPlan
    from .data.loader import MicroBatch, load_micro_batch
    from .job.errors import JobError
    from .job.file import load_job
    from .job.schema import Job
    from .launch.process_group import cleanup
    from .models import build_model
    from .models.losses import cross_entropy
    from .strategies.registry import open_engine
    from .training.evaluation import evaluate
    from .training.loop import train

_HOMES = {
    "BatchPlan": "data.batches",
    "Job": "job.schema",
    "JobError": "job.errors",
    "MicroBatch": "data.loader",
    "build_data": "data",
    "build_model": "models",
    "cleanup": "launch.process_group",
    "compare": "comparison.session",
    "cross_entropy": "models.losses",
    "evaluate": "training.evaluation",
    "load_job": "job.file",
    "load_micro_batch": "data.loader",
    "open_engine": "strategies.registry",
    "train": "training.loop",
}
__all__ = ["BatchPlan", "Job", "JobError", "MicroBatch", "build_data", "build_model", "cleanup"]
__all__ += ["compare", "cross_entropy", "evaluate", "load_job", "load_micro_batch", "open_engine"]
__all__ += ["train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
