"""Says what a checkpoint is, and whether it is whole: `hybrid inspect`. No model is made."""

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from ..job.errors import JobError
from .folders import list_checkpoints, verify
from .manifest import MANIFEST, RANK_FILE, Manifest
from .names import CHECKPOINTS


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Holds what was found in a checkpoint's folder.

    manifest: None where it cannot be read. problems: a line each, which begins with a file's name.
    """

    folder: Path
    manifest: Manifest | None
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return what `hybrid inspect --json` prints."""
        found, values = self.manifest, self.manifest.values if self.manifest else {}
        return {
            "step": found and found.step,
            "strategy": values.get("strategy"),
            "layout": values.get("layout"),
            "state_hash": found and found.state_hash,
            "tensors": found and len(found.entries),
            "bytes": found and found.num_bytes,
            "verified": not self.problems,
            "problems": self.problems,
        }

    def lines(self) -> list[str]:
        """Return the same for a person to read, with the processes, the time and the releases."""
        lines = [f"checkpoint  {self.folder}"]
        if self.manifest:
            values = self.manifest.values
            degrees = ", ".join(f"{key} {n}" for key, n in values["layout"].items())
            when = datetime.datetime.fromtimestamp((self.folder / MANIFEST).stat().st_mtime)
            lines += [
                f"step        {self.manifest.step} ({values['samples']:,} samples)",
                f"strategy    {values['strategy']}",
                f"layout      {degrees}",
                f"processes   {values['world_size']}",
                f"tensors     {len(self.manifest.entries):,}",
                f"bytes       {self.manifest.num_bytes:,} in {len(values['files'])} files",
                f"state hash  {self.manifest.state_hash}",
                f"written     {when:%Y-%m-%d %H:%M:%S}",
                f"versions    {', '.join(f'{k} {v}' for k, v in values['versions'].items())}",
            ]
        how = "every file and the hash of the state" if not self.problems else "NO"
        return [*lines, f"verified    {how}", *(f"problem     {p}" for p in self.problems)]


def inspect(path: Path) -> Inspection:
    """Verify a checkpoint: every file, and the hash of the whole state.

    path: its folder, or that of a run, whose newest is taken. Raises JobError where it is none."""
    folder = find_folder(path)
    try:
        return Inspection(folder, *verify(folder, whole=True))
    except OSError as error:
        name = Path(str(error.filename or folder)).name
        return Inspection(folder, None, [f"{name}: {error.strerror}"])


def find_folder(path: Path) -> Path:
    """Return the folder of a checkpoint, or of a run's newest; raises JobError where it is none."""
    if not path.is_dir():
        raise JobError(f"{path}: is no folder; valid: the folder of a checkpoint or of a run")
    if is_checkpoint(path):
        return path
    below = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if newest := list_checkpoints(below):
        return newest[0]
    raise JobError(f"{path}: holds no checkpoint; valid: the folder of a checkpoint or of a run")


def is_checkpoint(path: Path) -> bool:
    """Tell whether a folder is a checkpoint's, though perhaps a damaged one."""
    named = [path] if path.name.startswith("step-") else []
    files = [file for file in path.iterdir() if RANK_FILE.fullmatch(file.name)]
    return bool(named or files or (path / MANIFEST).is_symlink() or (path / MANIFEST).exists())
