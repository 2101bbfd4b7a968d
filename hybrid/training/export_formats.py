"""Writes weights as other programs read them: one file of safetensors, or transformers' folder."""

import contextlib
import functools
from pathlib import Path

import torch

from ..checkpoint.sources import Weights
from ..checkpoint.tensors import Part, write_file
from ..models import build_model, can_be_made_on_meta, made_whole
from ..models.layers import Layers
from ..models.starting import match_names
from .saved import Saved

METADATA = {"format": "pt"}  # transformers reads no file without it


def _build(saved: Saved) -> Layers:
    """Make the model for its names alone, without values where its code allows that."""
    if can_be_made_on_meta(saved.job):
        with contextlib.suppress(Exception), torch.device("meta"):
            return build_model(made_whole(saved.job))[0]
    return build_model(made_whole(saved.job))[0]


def write_module(saved: Saved, part: Path) -> int:
    """Write one file, with each name that `load_state_dict` needs; return how many tensors."""
    layers = _build(saved)
    names = _names(layers)
    with contextlib.closing(saved.open()) as weights:
        write_weights(weights, layers, names, part)
    return len(names)


def _names(layers: Layers) -> dict[str, str]:
    """Return the canonical name of each tensor in the `state_dict` of the module that was brought.

    Of a list of layers that is `nn.Sequential(*layers)`, whose tied parameters have several names
    too."""
    if hasattr(layers, "model"):
        return layers.saved_names()
    canonical = {id(tensor): name for name, tensor in layers.tensors().items()}
    keyed = zip(layers.keys, layers, strict=True)
    named = ((f"{k}.{n}", t) for k, x in keyed for n, t in x.state_dict(keep_vars=True).items())
    return {name: canonical[id(tensor)] for name, tensor in named if id(tensor) in canonical}


def write_weights(weights: Weights, layers: Layers, names: dict[str, str], path: Path) -> None:
    """Stream a source's tensors into a new file, by these names of the canonical ones."""
    places = match_names(weights, layers)
    parts = []
    for name, canonical in names.items():
        source = places[canonical][0]
        form = weights.tensors[source]
        read = functools.partial(weights.read, source)
        parts.append(Part(name, form.dtype, form.size, read, form.shape))
    _, flusher = write_file(path, parts, METADATA)
    flusher.finish()


def write_folder(saved: Saved, part: Path) -> int:
    """Write a folder that transformers loads; return how many tensors."""
    from ..models.hf.saving import save_folder

    layers = build_model(made_whole(saved.job))[0]
    with contextlib.closing(saved.open()) as weights:
        return save_folder(saved.job, layers, weights, part)
