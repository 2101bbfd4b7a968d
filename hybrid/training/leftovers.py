"""This module tells what in a folder is a run's by its exact name, and refuses to touch the rest.

Only what it lists is removed or moved when another run takes the folder. Files of people, which
only look like a run's, are not overwritten: the run is refused. No torch."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ..checkpoint.names import CHECKPOINTS
from ..job.errors import NO_ROOM, JobError, NoRoom
from ..launch.logs import list_logs

STEPS = "steps.jsonl"
FILES = ("record.json", "job.json", STEPS)  # of a run
TRACKERS = "trackers"
FOLDERS = ("logs", CHECKPOINTS, TRACKERS)
STEP = re.compile(r"step-\d{8,}(\.old)?(\.part)?")
FINAL = "final"
_PART = r"(\.[0-9a-f]+)?(\.part)?"
_IN_STEP = re.compile(rf"\.?(rank\d+\.safetensors|manifest\.json){_PART}")
_IN_FINAL = re.compile(rf"\.?(model\.safetensors|checkpoint\.json){_PART}")
# The keys by which a JSON file with such a name is known to be of this tool.
KEYS = {
    "record.json": {"strategy", "status"},
    "session.json": {"job", "nproc"},
    "compare.json": {"strategies", "parity"},
    "eval.json": {"strategy", "checkpoint"},
}


def is_ours(file: Path) -> bool:
    """Tell whether a JSON file is one of this tool's by its keys, or an empty one."""
    try:
        text = file.read_bytes()
        found = json.loads(text) if text else dict.fromkeys(KEYS[file.name])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and KEYS[file.name] <= found.keys()


def check_folder(out: Path) -> None:
    """Raise JobError where a folder is no place for results, such as a home."""
    real = Path(os.path.realpath(out))
    with contextlib.suppress(RuntimeError):  # there is no home
        if real == Path(os.path.realpath(Path.home())):
            _refuse(out, "is a home")
    if real == Path(real.anchor):
        _refuse(out, "is the root of all folders")
    if os.path.lexists(real / ".git"):
        _refuse(out, "is the top of a checkout of git")


def _refuse(out: Path, why: str) -> None:
    raise JobError(f"--out {out}: {why}; valid: a folder of its own for the results, such as in it")


def check_kinds(out: Path, files: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Raise JobError where what is to be written in `out` has the name of another kind of file."""
    for name in files:
        path = out / name
        if path.exists() and not path.is_file():
            refuse_one(out, path, "is no file, and a file of this name is to be written")
    for name in folders:
        path = out / name
        if os.path.lexists(path) and not path.is_dir():
            refuse_one(out, path, "is no folder, and one of this name is to be made")
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise NoRoom(f"{out}: {NO_ROOM}{path.name}: {os.strerror(errno.EACCES)}")


def refuse_one(out: Path, path: Path, why: str) -> NoReturn:
    """Raise JobError for a file in `out` that a run may not touch."""
    raise JobError(f"--out {out}: {path} {why}; valid: another --out, or move it away")


def check_ours(out: Path, names: Iterable[str]) -> None:
    """Raise JobError where a file with one of these names is there and not of this tool."""
    for name in names:
        if (out / name).exists() and not is_ours(out / name):
            refuse_one(out, out / name, "is not of this tool, and would be overwritten")


def check_run(out: Path, goes_on: bool = False) -> None:
    """Raise JobError where a run in `out` would overwrite or remove what is not of an earlier run.

    goes_on: what is saved there stays. What a run does not need to touch stays in any case, and is
    not looked at. Raises NoRoom."""
    check_kinds(out, FILES, FOLDERS)
    check_ours(out, ["record.json"])
    job, steps = out / "job.json", out / STEPS
    saved = list_saved(out / CHECKPOINTS)
    if job.exists() and not (saved or (out / "record.json").exists()):
        refuse_one(out, job, "is of no run, as it has no record.json, and would be overwritten")
    if steps.exists() and not _has_steps(steps):
        refuse_one(out, steps, "is of no run, and would be overwritten")
    for found in saved if not goes_on else []:
        for path, known in _contents(found):
            if not known:
                refuse_one(out, path, "is of no run, and would be removed with that folder")
    checkpoints = out / CHECKPOINTS
    if checkpoints.is_symlink() and (checkpoints.resolve().parent / "record.json").exists():
        refuse_one(out, checkpoints, "is a link to those of another run")
    if (checkpoints / FINAL).is_symlink():
        refuse_one(out, checkpoints / FINAL, "is a link to a folder, and would be written to")


def _has_steps(file: Path) -> bool:
    try:
        with file.open("rb") as lines:
            first = lines.readline(2**20)
        return not first.endswith(b"\n") or {"step", "loss"} <= json.loads(first).keys()
    except (OSError, ValueError, AttributeError):
        return False


def list_saved(checkpoints: Path) -> list[Path]:
    """Return the folders of a run's states and its final weights, and no other."""
    if not checkpoints.is_dir():
        return []
    found = (path for path in checkpoints.iterdir() if path.is_dir() and not path.is_symlink())
    return [path for path in found if path.name == FINAL or STEP.fullmatch(path.name)]


def _contents(saved: Path) -> Iterator[tuple[Path, bool]]:
    """Return the files of a folder of `list_saved`, and whether each is a checkpoint's."""
    known = _IN_FINAL if saved.name == FINAL else _IN_STEP
    for path in saved.iterdir():
        yield path, bool(known.fullmatch(path.name)) and not path.is_dir()


def list_files(out: Path, names: Sequence[str]) -> list[Path]:
    """Return those files in `out` by these names, after what a killed process wrote of them."""
    known = [name for name in names if os.path.lexists(out / name)]
    half = re.compile(rf"\.?({'|'.join(map(re.escape, names))}){_PART}")
    there = os.listdir(out) if out.is_dir() else []
    halves = [name for name in there if name.endswith(".part") and half.fullmatch(name)]
    return [path for name in (*halves, *known) if not (path := out / name).is_dir()]


def list_run(out: Path) -> list[Path]:
    """Return what is a run's in `out`: files, and folders of checkpoints."""
    files = list_files(out, FILES)
    return [*files, *list_logs(out / "logs"), *list_saved(out / CHECKPOINTS)]


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders that `list_run` returned, but no file that is not a run's."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            for inside, known in [*_contents(path)]:
                if known:
                    inside.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a file in it is not a run's
                path.rmdir()
        else:
            path.unlink(missing_ok=True)


def move(paths: Iterable[Path], source: Path, target: Path) -> None:
    """Move files and folders from one folder into another, each under the same relative path."""
    for path in paths:
        new = target / path.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(path, new)
        except OSError as error:  # such as where `logs` is a link to another disk
            if error.errno != errno.EXDEV:
                raise
            shutil.move(path, new)


def move_run(source: Path, target: Path) -> None:
    """Move a run to another folder, which may be there and keep what people and trackers put in it.

    What a tracker wrote of the run goes along, unless it wrote the same name there."""
    if not os.path.lexists(target):
        os.replace(source, target)
        return
    move(list_run(source), source, target)
    tracked = [*(source / TRACKERS).iterdir()] if (source / TRACKERS).is_dir() else []
    new = (p for p in tracked if not os.path.lexists(target / TRACKERS / p.name))
    move(new, source, target)
    remove_empty(source, FOLDERS)


def remove_empty(out: Path, names: Iterable[str] = ("logs", CHECKPOINTS)) -> None:
    """Remove these folders in `out`, and it, where they are empty."""
    for path in (*(out / name for name in names), out):
        with contextlib.suppress(OSError):
            path.rmdir()
