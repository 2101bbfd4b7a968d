"""Keeps the runs of a comparison that was interrupted, if they are what would run now. No torch.

`OUT/session.json` says what the comparison in a folder was asked for. A run is kept if it ended
well, on as many processes, from the same job and with the same releases; one that was stopped goes
on from its newest checkpoint."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .. import records
from ..checkpoint.names import CHECKPOINTS
from ..job.errors import JobError
from ..job.file import flatten, to_dict
from ..job.outputs import read_folder
from ..job.reading import read_json, show
from ..job.schema import Job
from ..job.variants import resolve
from ..launch.endings import tell
from ..measure.machine import describe_machine
from ..records import Record
from ..records.steps import read_run
from ..training.check import print_warnings
from ..training.resume import AUTO, Chosen, choose
from .differences import find_lost_step
from .previous import RESULTS, SESSION, make_way

MACHINE = ("processor", "cores", "python", "packages", "commit")  # what figures depend on


def describe_session(job: Job, nproc: int, mark: str | None) -> dict[str, Any]:
    """Return what `session.json` says: the job, the processes, the machine and the releases.

    mark: the comparison's `id`."""
    machine = {key: value for key, value in describe_machine().items() if key in MACHINE}
    return {"id": mark, "job": to_dict(job), "nproc": nproc, "machine": machine}


def begin_session(out: Path, asked: Mapping[str, Any], resume: bool) -> None:
    """Write `session.json`, after an earlier comparison in this folder has made way."""
    if not resume and (kept := make_way(out, str(asked["id"]))):
        tell(kept)
    records.write(asked, out / SESSION)


def drop_results(out: Path) -> None:
    """Remove the results of a comparison that goes on, as one of its runs is made again."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def choose_folder(out: Path | None, resume: str | None) -> Path:
    """Return the folder of a comparison, which `--resume` may name too; raises JobError."""
    if resume is None or resume == "auto":
        return out or Path("out/compare")
    folder = read_folder(resume, "--resume")
    if out not in (None, folder):
        raise JobError(f"--out {out}: valid with --resume {resume}: the same, or none")
    if not os.path.isfile(folder / SESSION):  # whatever its name is
        raise JobError(f"--resume {resume}: holds no comparison: no {SESSION}")
    return folder


def check_session(out: Path, asked: Mapping[str, Any]) -> None:
    """Raise JobError, which names the first key that differs, if `out` holds another comparison.

    A variant that only one of the two has does not matter: it is a row of its own. Without a
    `session.json` there is nothing to differ from."""
    if not (out / SESSION).exists():
        return
    before = read_json(out / SESSION, f"--resume: {out / SESSION}")
    try:
        shared = before["job"]["variant"].keys() & asked["job"]["variant"].keys()
        then, now = _list_keys(before, shared), _list_keys(asked, shared)
    except (KeyError, TypeError, AttributeError):
        raise JobError(f"--resume: {out / SESSION} does not describe a comparison") from None
    for key in (*now, *then):
        if then.get(key) != now.get(key):
            raise JobError(
                f"--resume: {key.removeprefix('job.')} = {show(now.get(key))}, and the comparison "
                f"in {out} has {show(then.get(key))}; valid: the same, or another --out"
            )


def _list_keys(session: Mapping[str, Any], variants: Collection[str]) -> dict[str, Any]:
    """List what a session says by dotted keys, with these variants of its job alone."""
    job = session["job"]
    kept = {name: section for name, section in job["variant"].items() if name in variants}
    return dict(flatten({**session, "id": None, "job": {**job, "variant": kept}}))


def find_run(
    folder: Path,
    job: Job,
    name: str,
    world_size: int,
    session: Mapping[str, Any],
    interrupted: int | None = None,
) -> Record | None:
    """Return the record of a run in `folder` if it is the one that would run now, else None.

    session: what `describe_session` returned for the comparison. interrupted: the step after which
    the run must have been stopped and resumed; None: where it was stopped does not matter."""
    if (record := _read_record(folder, job, name)) is None:
        return None
    if record.comparison != session.get("id"):
        whose = f"the comparison {record.comparison}" if record.comparison else "no comparison"
        mine = f", and {SESSION} of {session['id']}" if session.get("id") else ""
        print_warnings([f"{folder}: begins anew: its record is of {whose}{mine}"])
        return None
    same = record.world_size == world_size and find_lost_step(record) is None
    same = same and record.environment.get("packages") == session["machine"]["packages"]
    if interrupted is not None:
        same = same and getattr(record.resumed_from, "step", None) == interrupted
    file = record.weights.file if record.weights else None
    whole = record.status == "ok" and file is not None and (folder / file).exists()
    return record if same and whole else None


def find_checkpoint(
    folder: Path, job: Job, name: str, world_size: int, session: Mapping[str, Any], shown: str
) -> Chosen | None:
    """Return the newest good checkpoint from which the run in `folder` can go on, else None.

    It must be of the run that would run now, whose steps up to there are all in `steps.jsonl`, so
    that the whole run can be judged. It says which newer ones it skips; shown: the run's name."""
    saved = folder / CHECKPOINTS
    if not any(saved.glob("step-*")):
        return None
    record = _read_record(folder, job, name)
    if record is None or record.comparison != session.get("id"):
        return None
    try:
        chosen = choose(folder, AUTO, resolve(job, name))
    except JobError as error:
        print_warnings([f"{shown}: begins anew: {error}"])
        return None
    if chosen is None:
        return None
    values = chosen.manifest.values
    here = session["machine"]["packages"]
    same = values["world_size"] == world_size
    same = same and values["strategy"] == resolve(job, name).strategy
    same = same and all(here.get(key) in (None, one) for key, one in values["versions"].items())
    if not same or _count_steps(folder / "steps.jsonl") < chosen.manifest.step:
        return None
    print_warnings(f"{shown}: {line}" for line in chosen.notes)
    return chosen


def _read_record(folder: Path, job: Job, name: str) -> Record | None:
    """Return the record of a run under this name in `folder` if it is of this job, else None."""
    try:
        record = read_run(folder)
        ran = _of_run(records.load(folder / "job.json"), name)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    same = record.strategy == name and ran == _of_run(to_dict(job), name)
    return record if same else None


def _count_steps(path: Path) -> int:
    """Count the steps from 0 on of which a file has whole lines."""
    count = 0
    try:
        if not path.is_file():
            return 0
        with path.open() as lines:
            for line in lines:
                if not line.endswith("\n") or json.loads(line)["step"] != count:
                    break
                count += 1
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return count


def _of_run(job: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return what a run under one name depends on: no other variant, and no proxy."""
    found = {key: value for key, value in job.items() if key not in ("variant", "proxy")}
    return found | {"variant": job.get("variant", {}).get(name)}
