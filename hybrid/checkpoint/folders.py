"""Finds the checkpoints of a run, verifies them, and removes old ones and unfinished ones.

A checkpoint is the folder `step-00000020` (optimizer steps done). It has this name only once it is
whole: until then its name ends in `.part`."""

import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from ..job.reading import read_json
from .file_hash import hash_of_files
from .manifest import MANIFEST, BadManifest, Manifest, read_manifest
from .names import step_name
from .tensor_file import Damaged, TensorFile, sha256_of
from .weights import ABOUT

_NAME = re.compile(r"step-(\d{8,})")
PART = ".part"


def folder_of(checkpoints: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / step_name(step)


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


def replaced_name(folder: Path) -> Path:
    """Return the name that a checkpoint has while another of the same step takes its place."""
    return folder.with_name(f"{folder.name}.old{PART}")


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what saves that did not end have left, and checkpoints half removed.

    One that was to be replaced, and was not, gets its name back."""
    for old in checkpoints.glob(f"step-*.old{PART}"):
        folder = old.with_name(old.name.removesuffix(f".old{PART}"))
        if (old / MANIFEST).exists() and not folder.exists():
            os.rename(old, folder)
    for path in checkpoints.glob(f"step-*{PART}"):
        shutil.rmtree(path, ignore_errors=True)


def prune(checkpoints: Path, keep: int | None, kept: Collection[int], newest: int) -> None:
    """Remove all but the newest `keep` checkpoints and those of the steps `kept`.

    newest: the step that was saved last. Checkpoints of later steps were left by a run that went on
    from there, which this one has taken the place of: they go. A folder loses its name first, so
    that no half of a checkpoint ever bears one."""
    found = list_checkpoints(checkpoints)
    earlier = [step_of(path) for path in found if step_of(path) <= newest]
    left = {*earlier[:keep], *kept} if keep else {*earlier}
    for folder in found:
        if step_of(folder) not in left:
            part = folder.with_name(folder.name + PART)
            if part.exists():
                shutil.rmtree(part)
            os.rename(folder, part)
            # Over NFS a file that a reader has open keeps its folder: the next start removes it.
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
        if problem := _problem(folder / name, stated, again=whole):
            problems.append(f"{name}: {problem}")
    problems = problems or _misplaced(folder, manifest)
    if whole and not problems and hash_of_files(folder, manifest) != manifest.state_hash:
        problems.append(f"{MANIFEST}: state_hash is not that of the files' tensors")
    return manifest, problems


def find_newest(
    checkpoints: Path, whole: bool = False
) -> tuple[tuple[Path, Manifest] | None, list[str]]:
    """Return the newest checkpoint that verifies, with its manifest, and why newer ones do not.

    whole: see `verify`."""
    skipped: list[str] = []
    for folder in list_checkpoints(checkpoints):
        manifest, problems = verify(folder, whole)
        if manifest is not None and not problems:
            return (folder, manifest), skipped
        skipped.append(f"{folder.name} is skipped: {problems[0]}")
    return None, skipped


def find_unless_final(checkpoints: Path) -> tuple[tuple[Path, Manifest] | None, list[str]]:
    """Return what `find_newest` does; nothing where the run's final weights are of a later step."""
    found, about = list_checkpoints(checkpoints), checkpoints / "final" / ABOUT
    if found and about.is_file():
        step = read_json(about, str(about)).get("step")
        if isinstance(step, int) and step > step_of(found[0]):
            return None, []
    return find_newest(checkpoints)


def _problem(path: Path, stated: dict[str, object], again: bool) -> str | None:
    try:
        size = path.stat().st_size
        if path.is_symlink() or not path.is_file():
            return "is no regular file"
        if size != stated["bytes"]:
            return f"has {size:,} bytes; the manifest says {stated['bytes']:,}"
        if sha256_of(path, again) != stated["sha256"]:
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
                span is None or span.dtype != entry.dtype or span.size < piece.size
            ):
                found.append(f"{piece.file}: has no such {piece.key!r}, of {tensor} {key}")
    return found
