"""This module builds one whole copy of a model on a host, however many ranks train it there.

The first rank of a host makes the model and writes its tensors to a file. The others make only its
shape, on torch's meta device, and map the file into memory. A mapped tensor takes none of a rank's
own memory until it is written to, so what a stage or a shard does not keep is never copied."""

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
    """Builds the model on every rank as `build_model` does; this is a collective call.

    A user's own function makes all values on each rank, since it may compute with them."""
    if placement.world_size == 1 or not can_be_made_on_meta(job):
        return build_model(job)
    first, folder, host = placement.local_rank == 0, "", placement.host
    built = None
    try:
        if first:
            built = build_model(job)
            folder = tempfile.mkdtemp(prefix="hybrid-")
            tensors = built[0].tensors().items()  # some are views, which the file cannot hold
            save_file({n: t.detach().contiguous() for n, t in tensors}, Path(folder) / FILE)
        places = [f for h, f in gather_objects((host, folder)) if h == host and f]
        if built is None:
            built = _map(job, Path(places[0]) / FILE)
        gather_objects(None)  # all have mapped the file, so its name can go
    finally:
        if folder:
            shutil.rmtree(folder)
    return built


def _map(job: Job, path: Path) -> tuple[Layers, Loss]:
    """Builds the model around a file's tensors, or with values where its family needs them."""
    from .hf.probe import NotOnMeta

    try:
        with torch.device("meta"):
            built = build_model(job)
    except NotOnMeta:
        return build_model(job)
    _fill(built[0], path)
    return built


def _fill(layers: Layers, path: Path) -> None:
    """Gives meta tensors the values in a file; each keeps its identity, so that ties hold."""
    values = load_file(path)
    for name, tensor in layers.tensors().items():
        value = values.pop(name)
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        else:
            value = value.clone()  # it outlives the parameters and would keep all mapped
        torch.utils.swap_tensors(tensor, value)
    if values:
        raise RuntimeError(f"{path.name} has tensors that the model has not: {sorted(values)}")
