"""Writes the weights of a checkpoint for other programs: `hybrid export`.

A user's module gets one file of safetensors with the names of its own `state_dict`, which
`load_state_dict(strict=True)` takes; a model of transformers a folder that `from_pretrained` loads.
Formats that are pickles are refused: whoever loads one runs what it names. What can be refused
without torch is refused here; `hybrid.training.export_formats` writes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint.flushing import flush_file, flush_folder
from ..job.errors import JobError, needs_room
from ..models import HF
from ..records.whole import naming, working_folder
from .check import print_warnings
from .saved import JobFrom, find_saved

REFUSED = {
    "deepspeed-universal": "DeepSpeed's universal format is files of torch.save, which are pickles",
    "dcp": "the .metadata of torch's distributed checkpoints is a pickle",
}


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
    from .export_formats import write_folder, write_module  # torch comes with them

    with needs_room(path.parent), _at_once(path) as part:
        write = write_folder if saved.job.model.name.startswith(HF) else write_module
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
