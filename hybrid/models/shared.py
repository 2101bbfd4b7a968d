"""One whole copy of a model on a host, however many ranks train it there.

The first rank of a host makes the model and writes its tensors to a file; the others make its shape
alone, on torch's meta device, and map the file. A mapped tensor takes no memory of the rank's own
until it is written to: what a stage or a shard leaves behind is never copied.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..job.schema import Job
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from . import build_model, can_be_made_on_meta
from .layers import Layers
from .losses import Loss

FILE = "start.safetensors"


def build_shared(job: Job, placement: Placement) -> tuple[Layers, Loss]:
    """`build_model` on every rank; collective. A user's own function is called on each rank for
    real, since nothing says that it can do without values."""
    if placement.world_size == 1 or not can_be_made_on_meta(job):
        return build_model(job)
    first, folder, host = placement.local_rank == 0, "", placement.host
    built = None
    try:
        if first:
            built = build_model(job)
            folder = tempfile.mkdtemp(prefix="hybrid-")
            save_file(_contiguous(built[0]), Path(folder) / FILE)
        places = [f for h, f in gather_objects((host, folder)) if h == host and f]
        if built is None:
            built = _map(job, Path(places[0]) / FILE)
        gather_objects(None)  # all have mapped the file: its name can go
    finally:
        if folder:
            shutil.rmtree(folder)
    return built


def _map(job: Job, path: Path) -> tuple[Layers, Loss]:
    """The model around the tensors of a file; made for real where its family needs values."""
    from .hf.probe import NotOnMeta

    try:
        with torch.device("meta"):
            built = build_model(job)
    except NotOnMeta:
        return build_model(job)
    _fill(built[0], path)
    return built


def _contiguous(layers: Layers) -> dict[str, torch.Tensor]:
    """Copies where tensors share memory without being one parameter: the file has no views."""
    return {name: t.detach().contiguous() for name, t in layers.tensors().items()}


def _fill(layers: Layers, path: Path) -> None:
    """Give meta tensors the values in a file; each keeps its identity, so that ties hold."""
    values = load_file(path)
    for name, tensor in layers.tensors().items():
        value = values.pop(name)
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        else:
            value = value.clone()  # a buffer outlives the parameters, and would keep all mapped
        torch.utils.swap_tensors(tensor, value)
    if values:
        raise RuntimeError(f"{path.name} has tensors that the model has not: {sorted(values)}")
