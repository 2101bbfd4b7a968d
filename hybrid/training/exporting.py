"""Writes the weights of a checkpoint for other programs: `hybrid export`.

A user's module gets one file of safetensors with the names of its own `state_dict`, which
`load_state_dict(strict=True)` takes; a model of transformers a folder that `from_pretrained` loads.
Formats that are pickles are refused: whoever loads one runs what it names."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.flushing import flush_file, flush_folder
from ..checkpoint.sources import Weights
from ..checkpoint.tensor_file import Part, write_file
from ..job.errors import JobError, needs_room
from ..models import HF, build_model, can_be_made_on_meta
from ..models.layers import Layers
from ..models.starting import match_names
from ..records.whole import naming, working_folder
from .check import print_warnings
from .saved import JobFrom, Saved, find_saved

REFUSED = {
    "deepspeed-universal": "DeepSpeed's universal format is files of torch.save, which are pickles",
    "dcp": "the .metadata of torch's distributed checkpoints is a pickle",
}
METADATA = {"format": "pt"}  # transformers reads no file without it


def export(checkpoint: Path, to: str, given: JobFrom) -> dict[str, Any]:
    """Write the weights of a checkpoint to `to`, a path that is not there yet.

    Returns the `path`, the `tensors` and `bytes` written, and the `checkpoint`. Raises JobError
    where the checkpoint or the path is wrong, or the format has pickles; NoRoom."""
    kind, path = to.partition(":")[0], Path(to)
    if kind in REFUSED:
        raise JobError(
            f"--to {to}: {REFUSED[kind]}, and this project writes none; valid: a path, for "
            "safetensors"
        )
    if path.exists() or path.is_symlink():
        raise JobError(f"--to {to}: is there already; valid: a path that is not")
    saved = find_saved(checkpoint, given)
    print_warnings(saved.notes)
    with needs_room(path.parent), _at_once(path) as part:
        write = _write_folder if saved.job.model.name.startswith(HF) else _write_module
        tensors = write(saved, part)
        files = [part] if part.is_file() else [file for file in part.iterdir() if file.is_file()]
        size = sum(file.stat().st_size for file in files)
    found = {"path": to, "tensors": tensors, "bytes": size, "checkpoint": saved.describe()}
    return found


@contextlib.contextmanager
def _at_once(path: Path) -> Iterator[Path]:
    """Give a name to write to, in a new folder beside `path`, which becomes `path` in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with working_folder(path) as folder, naming(path):
        part = folder / path.name
        yield part
        mode = folder.stat().st_mode & 0o666  # by the umask, which not every library heeds
        for written in [part, *part.rglob("*")]:
            if written.is_file():
                written.chmod(mode)
                flush_file(written)
        if path.exists():
            raise JobError(f"--to {path}: is there already; valid: a path that is not")
        os.rename(part, path)
        flush_folder(path.parent)


def _build(saved: Saved) -> Layers:
    """Make the model for its names alone, without values where its code allows that."""
    if can_be_made_on_meta(saved.job):
        with contextlib.suppress(Exception), torch.device("meta"):
            return build_model(saved.job)[0]
    return build_model(saved.job)[0]


def _write_module(saved: Saved, part: Path) -> int:
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


def _write_folder(saved: Saved, part: Path) -> int:
    """Write a folder that transformers loads; return how many tensors."""
    from ..models.hf.saving import save_folder

    layers = build_model(saved.job)[0]
    with contextlib.closing(saved.open()) as weights:
        return save_folder(saved.job, layers, weights, part)
