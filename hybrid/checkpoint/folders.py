"""Finds the checkpoints of a run, verifies them, and removes old ones and unfinished ones.

A checkpoint is the folder `step-00000020` (optimizer steps done). It has this name only once it is
whole: until then its name ends in `.part`."""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from .manifest import MANIFEST, BadManifest, Manifest, read_manifest
from .state_hash import hash_of_files
from .tensor_file import Damaged, TensorFile, dtype_name, sha256_of

_NAME = re.compile(r"step-(\d{8,})")
PART = ".part"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the folders of committed checkpoints, the newest first."""
    found = [path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    found = _NAME.fullmatch(folder.name)
    if found is None:
        raise ValueError(f"{folder}: is no checkpoint's name")
    return int(found[1])


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what saves that did not end have left, and checkpoints half removed."""
    for path in checkpoints.glob(f"step-*{PART}"):
        shutil.rmtree(path, ignore_errors=True)


def prune(checkpoints: Path, keep: int | None, kept: Collection[int] = ()) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps `kept`.

    A folder loses its name first, so that no half of a checkpoint ever bears one."""
    for folder in list_checkpoints(checkpoints)[keep:] if keep else []:
        if step_of(folder) not in kept:
            _remove(folder)


def remove_later(checkpoints: Path, step: int) -> None:
    """Remove the checkpoints after `step`, once that one is saved.

    A run that went on from an earlier step makes them anew; else "auto" would take those of the
    course that was given up."""
    for folder in list_checkpoints(checkpoints):
        if step_of(folder) > step:
            _remove(folder)


def _remove(folder: Path) -> None:
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    os.rename(folder, part)
    shutil.rmtree(part, ignore_errors=True)


def verify(folder: Path, whole: bool = False) -> tuple[Manifest | None, list[str]]:
    """Return the manifest of a checkpoint, and what is wrong with it, a line each.

    Every file is read once and its SHA-256 taken. whole: the hash of the state is taken as well."""
    try:
        manifest = read_manifest(folder)
    except BadManifest as error:
        return None, [str(error)]
    files = manifest.values["files"]
    problems = [
        f"{path.name}: is no file of this checkpoint"
        for path in sorted(folder.iterdir())
        if path.name not in files and path.name != MANIFEST
    ]
    if _NAME.fullmatch(folder.name) and step_of(folder) != manifest.step:
        problems.append(f"{MANIFEST}: is of step {manifest.step}, the folder of another")
    for name, stated in files.items():
        if problem := _problem(folder / name, stated):
            problems.append(f"{name}: {problem}")
    problems = problems or _misplaced(folder, manifest)
    if whole and not problems and hash_of_files(folder, manifest) != manifest.state_hash:
        problems.append(f"{MANIFEST}: state_hash is not that of the files' tensors")
    return manifest, problems


def _problem(path: Path, stated: dict[str, object]) -> str | None:
    try:
        size = path.stat().st_size
        if path.is_symlink() or not path.is_file():
            return "is no regular file"
        if size != stated["bytes"]:
            return f"has {size:,} bytes; the manifest says {stated['bytes']:,}"
        if sha256_of(path) != stated["sha256"]:
            return "is damaged, its SHA-256 is not the one in the manifest"
    except OSError as error:
        return str(error.strerror)
    return None


def _misplaced(folder: Path, manifest: Manifest) -> list[str]:
    """Say which pieces are not in the files as the manifest says."""
    found: list[str] = []
    spans = {}
    for name in manifest.values["files"]:
        try:
            file = TensorFile(folder / name)
        except Damaged as error:
            found.append(str(error))
            continue
        spans[name] = file.spans
        file.close()
    for (tensor, key), entry in manifest.entries.items():
        for piece in entry.pieces:
            span = spans.get(piece.file, {}).get(piece.key)
            if piece.file in spans and (
                span is None or dtype_name(span.dtype) != entry.dtype or span.size < piece.size
            ):
                found.append(f"{piece.file}: has no such {piece.key!r}, of {tensor} {key}")
    return found
