"""Saves a model's final weights as safetensors with a checksum, and verifies saved ones."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..job.errors import JobError
from ..job.reading import read_json

ABOUT = "checkpoint.json"
FILE = "model.safetensors"


def save_weights(
    state: Mapping[str, torch.Tensor],
    folder: Path,
    about: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> Path:
    """Write `model.safetensors` and `checkpoint.json` (its SHA-256 and `about`) into `folder`.

    names: those in the file, each with its name in `state`; left out, all of `state` is written by
    its own names. Returns the path of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    tensors: dict[str, torch.Tensor] = {}
    for name, source in (names or dict(zip(state, state, strict=True))).items():
        tensor = state[source].contiguous()
        twice = any(tensor is t for t in tensors.values())  # the file's format holds no ties
        tensors[name] = tensor.clone() if twice else tensor
    save_file(tensors, path)
    text = json.dumps({"file": FILE, "sha256": _sha256(path), **about}, indent=1)
    (folder / ABOUT).write_text(text + "\n")
    return path


def verify_weights(folder: Path) -> Path:
    """Return the path of the weights in a checkpoint's folder.
    Raises JobError unless they are what was written."""
    file, about = folder / FILE, folder / ABOUT
    for path in (about, file):
        if not path.is_file():  # also a pipe, to open which would wait for ever
            words = "No such file or directory" if not path.exists() else "is no regular file"
            raise JobError(f"{path}: {words}; a run that has ended has its final weights there")
    try:
        expected = read_json(about, str(about))["sha256"]
        found = _sha256(file)
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}") from None
    except (TypeError, KeyError):
        raise JobError(f"{about}: does not name the weights' sha256") from None
    if found != expected:
        raise JobError(f"{file}: is damaged, its SHA-256 is not the one in checkpoint.json")
    return file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
