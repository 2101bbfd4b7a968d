"""This module keeps the comparison before in `OUT/previous`, until another has ended well.

A comparison that begins in a folder with a whole one moves that there first: its results and what
its runs left, by their exact names. So all that stands in OUT is of one comparison, whatever ends
the new one. Where no run of the new one has failed, what was kept is removed. A comparison that was
killed has no results and is not kept, nor is one with a failed run where a better one is. No torch.
"""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..job.errors import JobError
from ..launch.folder_lock import hold
from ..records import PROXY
from ..training.leftovers import (
    check_folder,
    check_kinds,
    check_ours,
    check_run,
    is_ours,
    list_files,
    list_run,
    move,
    refuse_one,
    remove,
    remove_empty,
)

SESSION = "session.json"
RESULTS = ("compare.json", "compare.md", "report.html")
PREVIOUS = "previous"
PART = "previous.part"  # while what is to be kept is moved there
MOVED = "moved.json"  # in both: which comparison it is, and why it is there


@contextlib.contextmanager
def claim(out: Path, names: Sequence[str], resume: bool) -> Iterator[str | None]:
    """Have `out` for a comparison while the context lasts, and give its `id`.

    names: of its strategies. resume: the one in `out` goes on; its `id` is None if an earlier
    release began it. Raises JobError, which says who has the folder or what in it would be lost,
    and NoRoom."""
    check_folder(out)
    with hold(out):
        finish_move(out)
        check_place(out, names)
        goes_on = resume and (out / SESSION).exists()
        yield read_id(out) if goes_on else make_id()


def check_place(out: Path, names: Sequence[str]) -> None:
    """Raise JobError where a comparison would overwrite in `out` what is not of this tool.

    names: of its runs. Raises NoRoom."""
    for name in (PREVIOUS, PROXY):
        if name in names:
            raise JobError(f"variant.{name}: a folder has this name; valid: another name")
    check_kinds(out, [SESSION, *RESULTS], [*names, PROXY, PREVIOUS, PART])
    check_ours(out, [SESSION, RESULTS[0]])
    if not any(is_ours(out / name) for name in (SESSION, RESULTS[0])):
        for name in RESULTS[1:]:
            if (out / name).exists():
                refuse_one(out, out / name, "is of no comparison, and would be overwritten")
    for name in names:
        check_run(out / name)
    if (out / PROXY).is_dir():
        check_place(out / PROXY, names)


def make_way(out: Path, new: str) -> str:
    """Move a whole comparison in `out` to `previous`, or remove one that was not ended.

    new: the `id` of the one that begins. Returns what is kept in words, empty: nothing."""
    finish_move(out)
    whole = all((out / name).is_file() for name in RESULTS)
    old, labels = read_id(out), _labels_of(out)
    if whole and (_ended_well(out) or not (out / PREVIOUS / MOVED).exists()):
        moved = {"comparison": old, "runs": labels, "replaced_by": new, "at": _now()}
        records.write(moved, out / PART / MOVED)
        finish_move(out)
    else:
        remove(_list_all(out, labels))
        _remove_empty(out, labels)
    kept = out / PREVIOUS / MOVED
    if not kept.exists():
        return ""
    date = records.load_object(kept).get("comparison") or "before"
    return f"{kept.parent} keeps the comparison {date} until one in {out} has ended well"


def _ended_well(out: Path) -> bool:
    """Tell whether no run of the comparison in `out` failed or was interrupted."""
    runs = records.load_object(out / RESULTS[0]).get("strategies")
    return isinstance(runs, dict) and all(
        isinstance(run, dict) and run.get("status") != "failed" for run in runs.values()
    )


def finish_move(out: Path) -> None:
    """End the move that `make_way` has begun, also where its process was killed then."""
    part, kept = out / PART, out / PREVIOUS
    if not (part / MOVED).exists():
        for half in part.glob(f"*{MOVED}*.part"):  # of a process that was killed while it wrote it
            half.unlink()
        remove_empty(part, [])
        return
    moved = records.load_object(part / MOVED)
    labels = [*_plain(moved.get("runs", []))]
    move(_list_all(out, labels), out, part)
    _remove_empty(out, labels)
    remove_previous(out)
    try:
        os.rename(part, kept)
    except OSError:  # a file in it that is not of a comparison keeps the old folder
        move([*_list_all(part, labels), part / MOVED], part, kept)
        _remove_empty(part, labels)


def remove_previous(out: Path) -> None:
    """Remove what was kept of the comparison before, and nothing else there."""
    kept = out / PREVIOUS
    labels = [*_plain(records.load_object(kept / MOVED).get("runs", []))]
    if (kept / MOVED).exists():
        remove([*_list_all(kept, labels), kept / MOVED])
        _remove_empty(kept, labels)


def read_id(out: Path) -> str | None:
    """Return the `id` of the comparison in `out`, None where it has none."""
    found = records.load_object(out / SESSION).get("id")
    return found if isinstance(found, str) else None


def make_id() -> str:
    """Return when a comparison begins, in UTC, and some digits by which no other has the same."""
    return f"{_now()}-{os.urandom(4).hex()}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _labels_of(out: Path) -> list[str]:
    """Return the names of the runs of the comparison in `out`: by its results, and by its `id`."""
    old, result = read_id(out), records.load_object(out / RESULTS[0])
    held = [result.get(key) for key in ("strategies", "controls")]
    named = [name for runs in held if isinstance(runs, dict) for name in runs]
    folders = [path.name for path in out.iterdir() if path.is_dir()] if old else []
    own = [
        name
        for name in folders
        if records.load_object(out / name / "record.json").get("comparison") == old
    ]
    return [*dict.fromkeys([*_plain(named), *own])]


def _plain(names: Any) -> Iterator[str]:
    """Return those of the names that are names of folders in a folder, whatever a file says."""
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name:
            yield name


def _list_all(out: Path, labels: list[str]) -> list[Path]:
    """Return what is of a comparison in `out`; its session comes last, by which it is known."""
    found = [path for name in labels for path in list_run(out / name)]
    if is_ours(out / PROXY / SESSION) or is_ours(out / PROXY / RESULTS[0]):
        found += _list_all(out / PROXY, _labels_of(out / PROXY))
    return [*found, *list_files(out, (*RESULTS, SESSION))]


def _remove_empty(out: Path, labels: list[str]) -> None:
    if (out / PROXY).is_dir():
        _remove_empty(out / PROXY, [path.name for path in (out / PROXY).iterdir() if path.is_dir()])
    for name in labels:
        remove_empty(out / name)
    remove_empty(out, [])
