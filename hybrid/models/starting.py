"""This module gives a model the weights that a file or a folder has, by name.

`[model] weights = PATH` starts a run from them, with a fresh optimizer. `hybrid.checkpoint.sources`
says what PATH may be. `hybrid eval`, `export` and `generate` take weights in the same way."""

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.pieces import WEIGHT, Piece
from ..checkpoint.sources import Weights, open_weights
from ..checkpoint.tensor_file import BUFFER_BYTES
from ..checkpoint.tensors import raw_bytes
from ..job.errors import JobError
from ..job.schema import Job
from . import build_model, can_be_made_on_meta, made_whole
from .first_values import ByPart, require_resets
from .hf.probe import NotOnMeta
from .layers import Layers

Names = Mapping[str, Sequence[str]]


def start_from(job: Job, layers: Layers) -> dict[str, Any]:
    """Gives a new model the weights that the job names, and returns where they came from.

    Tensors on the meta device get none, but their names and shapes are checked. Raises JobError,
    one line, where the weights are not the model's."""
    path = job.model.weights
    assert path is not None
    try:
        weights = open_weights(Path(path), job.launch.trust_pickle)
        names = _start(job, weights, layers)
    except JobError as error:
        raise JobError(f"model.weights = {path!r}: {error}") from None
    return {"path": path, "kind": weights.kind, "tensors": len(names), **weights.about}


def start_on_meta(job: Job, layers: Layers) -> None:
    """Says where a model without values gets its first ones: from its own folder, or drawn.

    Raises JobError where it cannot."""
    if layers.saved_in is None:
        if layers.resets:
            require_resets(layers)
        layers.first_values = ByPart(job, layers)
        return
    try:
        _start(job, open_weights(layers.saved_in), layers)
    except JobError as error:
        raise JobError(f"model.name = {job.model.name!r}: {error}") from None


def _start(job: Job, weights: Weights, layers: Layers) -> dict[str, list[str]]:
    """Gives a model its weights, now or, if it is made without values, when it is filled.

    Returns their names, and closes them where they are not needed any more."""
    with contextlib.ExitStack() as opened:
        opened.callback(weights.close)
        names = match_names(weights, layers)
        live = layers.tensors().items()
        whole = (Piece(name, WEIGHT, tuple(t.shape), t) for name, t in live if not t.is_meta)
        fill(weights, whole, names)
        if job.model.on_meta:
            layers.first_values = ByPart(
                job, layers, lambda pieces: fill(weights, pieces, names), weights.close
            )
            opened.pop_all()
    return names


def match_names(weights: Weights, layers: Layers) -> dict[str, list[str]]:
    """Returns the names that a source has for each tensor of the whole model, by canonical name.

    A buffer that the model's `state_dict` leaves out may be missing. A tied parameter may have each
    of its names. Raises JobError where a name is missing or left over, or a shape or dtype is
    another one."""
    tensors, aliases = layers.tensors(), names_of(layers)
    needed = _needed(layers)
    found = {
        canonical: [name for name in aliases[canonical] if name in weights.tensors]
        for canonical in tensors
    }
    where = weights.where
    if missing := [name for name, there in found.items() if not there and name in needed]:
        raise JobError(f"{where}: has no {missing[0]}, which the model has{_more(missing)}")
    known = {name for names in aliases.values() for name in names}
    if extra := sorted(weights.tensors.keys() - known):
        raise JobError(f"{where}: has {extra[0]}, which the model has not{_more(extra)}")
    for canonical, names in found.items():
        for name in names:
            _require_form(f"{where}: {name}", weights.tensors[name], tensors[canonical])
    return {canonical: names for canonical, names in found.items() if names}


def require_fit(job: Job, weights: Weights) -> None:
    """Raises what `match_names` does before the model takes any memory, where it is one of ours.

    A job that was damaged may ask for a model of any size."""
    if can_be_made_on_meta(job):
        try:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                layers = build_model(made_whole(job))[0]
        except NotOnMeta:
            return
        match_names(weights, layers)


def _needed(layers: Layers) -> set[str]:
    """Returns the canonical names of what must be given: not what a `state_dict` leaves out."""
    left_out = {
        id(module._buffers[name])
        for module in layers.modules()
        for name in module._non_persistent_buffers_set
    }
    return {name for name, t in layers.tensors().items() if id(t) not in left_out}


def names_of(layers: Layers) -> dict[str, list[str]]:
    """Returns all names of each tensor in the whole model, by canonical name, which comes first."""
    canonical = {id(tensor): name for name, tensor in layers.tensors().items()}
    model = getattr(layers, "model", None)
    roots = [("", model)] if model is not None else [(f"{k}.", x) for k, x in _keyed(layers)]
    found = {name: [name] for name in canonical.values()}
    for prefix, root in roots:
        parameters = root.named_parameters(remove_duplicate=False)
        for name, tensor in (*parameters, *root.named_buffers(remove_duplicate=False)):
            full, first = prefix + name, canonical.get(id(tensor))
            if first is not None and full not in found[first]:
                found[first].append(full)
    return found


def _keyed(layers: Layers) -> Iterable[tuple[str, torch.nn.Module]]:
    return zip(layers.keys, layers, strict=True)


def _more(names: Sequence[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""


def _require_form(what: str, there: Any, here: torch.Tensor) -> None:
    """Raises JobError unless a value can be taken as it is, or widened to the model's dtype."""
    if there.shape != tuple(here.shape):
        raise JobError(f"{what} has shape {list(there.shape)}, the model's has {list(here.shape)}")
    wide = here.dtype in (torch.float32, torch.float64) and there.dtype.is_floating_point
    if there.dtype != here.dtype and not (wide and there.dtype.itemsize < here.dtype.itemsize):
        raise JobError(f"{what} is {there.dtype}, which the model's {here.dtype} cannot hold")


def fill(weights: Weights, pieces: Iterable[Piece], names: Names) -> None:
    """Puts a source's values into live parts of weights, a buffer at a time.

    names: of `match_names`. Raises JobError where one tied tensor has two values there."""
    for piece in pieces:
        if piece.name not in names:
            continue
        first, *others = names[piece.name]
        step = max(1, BUFFER_BYTES // piece.tensor.dtype.itemsize)
        for begin in range(0, piece.tensor.numel(), step):
            place = piece.start + begin, min(step, piece.tensor.numel() - begin)
            values = weights.read(first, *place)
            for other in others:
                if raw_bytes(values) != raw_bytes(weights.read(other, *place)):
                    raise JobError(
                        f"{weights.where}: {first} and {other} differ, and are one tensor in the "
                        "model"
                    )
            piece.write(begin, values.to(piece.tensor.dtype))
