"""Functions of this file itself, as in a notebook: a model, its loss and its data, and no name."""

from typing import Any

import torch
from torch import nn

import hybrid


def build(width: int = 32) -> tuple[nn.Module, nn.Module]:
    """Return a module and its loss. Each rank calls this."""
    module = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 2))
    return module, nn.CrossEntropyLoss()


def load() -> tuple[list[Any], list[Any]]:
    """Return a train set and a test set."""
    inputs = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    samples = list(zip(inputs, (inputs.sum(1) > 0).long(), strict=True))
    return samples[:500], samples[500:]


sections = {
    "model": {"name": "given", "options": {"width": 24}},  # the functions take the names' places
    "data": {"name": "given"},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "train": {"global_batch": 60, "micro_batches": 2, "steps": 20},
}
job = hybrid.load_job(sections)
result = hybrid.compare(job, ["ddp"], nproc=2, out="out/functions", model=build, data=load)
print("equal" if result.ok else "not equal")
