"""Saves a model's final weights as safetensors with a checksum, and verifies saved ones.

The module imports torch only where it saves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..job.errors import JobError
from ..job.reading import read_json
from ..records.whole import whole_path, write_whole
from .tensor_file import sha256_of

if TYPE_CHECKING:
    from .tensors import Part

ABOUT = "checkpoint.json"
FILE = "model.safetensors"


def save_weights(parts: "Sequence[Part]", folder: Path, about: Mapping[str, Any]) -> Path:
    """Write `model.safetensors` and `checkpoint.json` (its SHA-256 and `about`) into `folder`.

    Returns the path of the weights."""
    from .tensors import write_file  # torch comes with it

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    with whole_path(path) as new:
        written, flusher = write_file(new, parts)
        flusher.finish()
    words = {"file": FILE, "sha256": written["sha256"], **about}
    write_whole(folder / ABOUT, json.dumps(words, indent=1) + "\n")
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
        found = sha256_of(file, again=True)
    except OSError as error:
        raise JobError(f"{error.filename}: {error.strerror}") from None
    except (TypeError, KeyError):
        raise JobError(f"{about}: does not name the weights' sha256") from None
    if found != expected:
        raise JobError(f"{file}: is damaged, its SHA-256 is not the one in checkpoint.json")
    return file
