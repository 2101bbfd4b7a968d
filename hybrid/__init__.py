"""Trains one job under every parallel strategy, proves the runs equal, measures what each costs.

    job = hybrid.load_job("launch/jobs/mnist.toml", ["train.steps=20"])
    record = hybrid.train(job, "single")            # one run in this process
    comparison = hybrid.compare(job, nproc=4)       # every strategy, a launcher each

`open_engine` gives the engine alone, for people who keep their own loop. Importing costs no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compare import compare
    from .config import Job, JobError
    from .data.batches import BatchPlan, MicroBatch, load
    from .job_file import load_job
    from .strategies.registry import open_engine
    from .train import train

_HOMES = {
    "BatchPlan": "data.batches",
    "Job": "config",
    "JobError": "config",
    "MicroBatch": "data.batches",
    "compare": "compare",
    "load": "data.batches",
    "load_job": "job_file",
    "open_engine": "strategies.registry",
    "train": "train",
}
__all__ = ["BatchPlan", "Job", "JobError", "MicroBatch", "compare", "load", "load_job"]
__all__ += ["open_engine", "train"]


class _Package(types.ModuleType):
    """Looks its public names up when asked. `hybrid.train` and `hybrid.compare` are functions,
    although files of these names lie here: importing such a file must not put the module there."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'hybrid' has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOMES[name]}", self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES:
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
