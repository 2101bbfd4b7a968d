"""Decides how a run begins: anew, from a checkpoint, or not at all since it has ended already.

It says in one line what it found, which checkpoints it skipped, and in what the job was another
one. But for what an unfinished save has left, nothing is changed here."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..checkpoint.names import CHECKPOINTS
from ..job.errors import JobError
from ..job.file import flatten, to_dict
from ..job.outputs import read_folder
from ..job.variants import Choice
from ..launch.endings import tell
from ..launch.serialization import sendable
from ..layout import Layout
from ..records import Record
from .folder import belongs_to

AUTO = "auto"
# What the state or the samples follow from. Other keys may change: a warning names each.
_THE_SAME = ("model", "data.name", "data.options", "optimizer.name", "optimizer.options",
             "train.global_batch", "train.seed")  # fmt: skip
# What does not change what is computed, but for rounding.
_FREE = ("checkpoint", "launch", "log", "variant", "proxy", "parallel", "strategy", "data.workers",
         "train.micro_batches", "train.epochs", "train.eval_every", "train.eval_batches",
         "train.metrics", "train.activation_checkpointing", "train.compile")  # fmt: skip
# Settings of a strategy by which it computes another thing.
_ALGORITHM = {"local_sgd": ("sync_every",), "ddp": ("comm_hook", "powersgd_rank")}
_VALID = "valid: auto, a run's folder, a step's folder in it"


@sendable
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Holds the checkpoint that a run starts from.

    notes: which newer ones were skipped, and why; in what the job has changed."""

    folder: Path
    manifest: Any  # a `hybrid.checkpoint.manifest.Manifest`
    notes: Sequence[str] = ()

    def is_alike(self, choice: Choice, layout: Layout) -> bool:
        """Tell whether it was saved by the same strategy in the same layout."""
        values = self.manifest.values
        return bool(values["strategy"] == choice.strategy and values["layout"] == layout.to_dict())


@sendable
@dataclasses.dataclass(frozen=True)
class Start:
    """Says how a run begins.

    chosen: from this checkpoint. ended: not at all, since the folder has the record of all of its
    steps. said: this in words, empty where nothing was asked for. notes: warnings."""

    chosen: Chosen | None = None
    ended: Record | None = None
    said: str = ""

    @property
    def notes(self) -> Sequence[str]:
        """Return what to warn of, a line each."""
        return self.chosen.notes if self.chosen else ()


def check_start(out: Path | None, resume: str | Path | None) -> None:
    """Raise JobError for what `decide` would refuse, where no file has to be read to know it."""
    if resume is None:
        refuse_restart(out)
    elif resume != AUTO:
        path = _named_folder(resume)
        places = (path / "manifest.json", path / "record.json", path / CHECKPOINTS)
        if not any(map(os.path.lexists, places)) and not any(path.glob("step-*")):
            raise JobError(f"--resume {resume}: holds no checkpoint; {_VALID}")


def _named_folder(resume: str | Path) -> Path:
    path = read_folder(resume, "--resume")
    if not os.path.isdir(path):  # whatever its name is
        raise JobError(f"--resume {resume}: is no folder; {_VALID}")
    return path


def decide(out: Path | None, resume: str | Path | None, choice: Choice) -> Start:
    """Return how the run begins that `resume` asks for: None, "auto", or a folder.

    "auto" looks in `out` alone. The choice's job has its lengths in steps. Raises JobError where
    what is named cannot be used, where no checkpoint of several is whole, or where a new run would
    remove the checkpoints of one that did not end."""
    if resume is None:
        refuse_restart(out)
        return Start()
    if out is not None and (ended := find_ended(out, resume, choice)):
        return ended
    chosen = choose(out, resume, choice)
    if chosen is None:
        return Start(said=f"--resume {AUTO}: {out} has no checkpoint; the run starts at step 0")
    if out is not None and not belongs_to(chosen.folder, out):
        refuse_restart(out, f"--resume {resume}: ")
    return Start(chosen, said=f"goes on from {chosen.folder}")


def tell_start(start: Start) -> None:
    """Print how the run begins, where that was asked for, and what to warn of."""
    for line in start.notes:
        tell(f"warning: {line}")
    if start.said:
        tell(start.said)


def refuse_restart(out: Path | None, asked: str = "") -> None:
    """Raise JobError where `out` has checkpoints of a run that did not end well."""
    if out is None or not (steps := _saved_steps(out)):
        return
    status = _status(out)
    if status == "ok":
        return
    again = "" if _restarts() == "0" else "this process was started again; "
    raise JobError(
        f"{asked}{again}{out / CHECKPOINTS} has the state after {steps[0]} steps of a run that did "
        f"not end well (record.json: {status}), and a new run would remove it; "
        "valid: --resume auto to go on, or another --out"
    )


def _restarts() -> str:
    """Return how often torchrun or SLURM has started this run again."""
    counts = (os.environ.get(f"{k}_RESTART_COUNT", "0") for k in ("TORCHELASTIC", "SLURM"))
    return next((count for count in counts if count != "0"), "0")


def _saved_steps(out: Path) -> list[int]:
    """Return the steps of a run's checkpoints, the newest first, without torch."""
    names = (path.name.removeprefix("step-") for path in (out / CHECKPOINTS).glob("step-*"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _status(out: Path) -> str:
    try:
        return str(records.load(out / "record.json")["status"])
    except (OSError, ValueError, LookupError, TypeError):
        return "missing"


def find_ended(out: Path, resume: str | Path, choice: Choice) -> Start | None:
    """Return a start that does nothing, where `out` has the whole run that is asked for."""
    if resume != AUTO and Path(resume).resolve() != out.resolve():
        return None
    if _status(out) != "ok":
        return None
    try:
        record = records.read(Record, out / "record.json")
        before = records.load(out / "job.json")
    except (OSError, ValueError):
        return None
    if not isinstance(before, dict):
        return None
    # The newest checkpoint may be of an earlier step, where the run went on without saving.
    steps = [step.step + 1 for step in record.steps[-1:]]
    step = max([*steps, record.checkpoint.step if record.checkpoint else 0])
    if step != choice.job.train.steps:
        return None
    compare_jobs(f"--resume {resume}", choice, before, record.variant_of or record.strategy)
    said = f"{out}: the run has ended well, after {step} steps; nothing is left to do"
    return Start(ended=record, said=said)


def choose(out: Path | None, resume: str | Path, choice: Choice) -> Chosen | None:
    """Return the checkpoint that `resume` asks for, None where "auto" finds none."""
    given = f"--resume {resume}"
    if resume == AUTO:
        if out is None:
            raise JobError(f"{given}: the run has no folder; valid: a folder, or out=")
        _clear(out / CHECKPOINTS)
        return _newest(given, out / CHECKPOINTS, choice)
    from ..checkpoint.folders import list_checkpoints, verify
    from ..checkpoint.manifest import MANIFEST

    path = _named_folder(resume)
    if (path / MANIFEST).exists():
        manifest, problems = verify(path, whole=True)
        if problems or manifest is None:
            raise JobError(f"{given}: cannot be used: {problems[0]}")
        return _compared(given, Chosen(path, manifest), choice)
    below = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if out is not None and below.resolve() == (out / CHECKPOINTS).resolve():
        _clear(below)
    if not list_checkpoints(below):
        raise JobError(f"{given}: holds no checkpoint; {_VALID}")
    return _newest(given, below, choice)


def _clear(checkpoints: Path) -> None:
    """Clear away what the run before has left unfinished."""
    from ..checkpoint.folders import remove_unfinished

    remove_unfinished(checkpoints)


def read_chosen(folder: Path, choice: Choice) -> Chosen:
    """Return the checkpoint that the process which started this rank has chosen and verified."""
    from ..checkpoint.manifest import BadManifest, read_manifest

    given = f"--resume {folder}"
    try:
        return _compared(given, Chosen(folder, read_manifest(folder)), choice)
    except BadManifest as error:
        raise JobError(f"{given}: cannot be used: {error}") from None


def _newest(given: str, checkpoints: Path, choice: Choice) -> Chosen | None:
    """Return the newest checkpoint that verifies, None where there is none at all."""
    from ..checkpoint.folders import find_newest

    found, skipped = find_newest(checkpoints, whole=True)
    if found:
        return _compared(given, Chosen(*found, skipped), choice)
    if skipped:
        raise JobError(
            f"{given}: no checkpoint in {checkpoints} can be used; {'; '.join(skipped)}; "
            "valid: another checkpoint, or another --out to start at step 0"
        )
    return None


def _compared(given: str, found: Chosen, choice: Choice) -> Chosen:
    """Add what has changed in the job; raises JobError where the state would mean another thing."""
    values, step = found.manifest.values, found.manifest.step
    where = f"{given}: the checkpoint {found.folder}"
    changed = compare_jobs(where, choice, values["job"], values["strategy"])
    if step > (choice.job.train.steps or 0):
        raise JobError(
            f"train.steps = {choice.job.train.steps}: {where} is after {step} steps; "
            f"valid: {step} or more, or the checkpoint of an earlier step"
        )
    notes = [f"{key} = {new!r} from step {step} on; it was {old!r}" for key, new, old in changed]
    return dataclasses.replace(found, notes=[*found.notes, *notes])


def compare_jobs(
    where: str, choice: Choice, before: Mapping[str, Any], strategy: str
) -> list[tuple[str, Any, Any]]:
    """Return the keys that compute another thing from here on, with the new and the old value.

    before: the earlier job, under this strategy. Raises JobError where a key must stay the same."""
    here, there = dict(flatten(to_dict(choice.job))), dict(flatten(before))
    keys = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    for key in _under(keys, _THE_SAME):
        raise JobError(
            f"{key} = {here.get(key)!r}: {where} is of a run with {there.get(key)!r}; a run goes "
            "on with the model, the data, the batch and the seed that it had"
        )
    momenta = [values.get("optimizer.momentum", 0.0) for values in (here, there)]
    if choice.job.optimizer.name == "sgd" and all(momenta) != any(momenta):
        raise JobError(
            f"optimizer.momentum = {momenta[0]}: {where} is of a run with {momenta[1]}, "
            "and with 0 there is no momentum to keep"
        )
    free = set(_under(keys, _FREE))
    if strategy == choice.strategy:
        settings = [f"strategy.{strategy}.{key}" for key in _ALGORITHM.get(strategy, ())]
        free -= set(_under(keys, settings))
    if choice.job.checkpoint.best:  # other scores than before would choose it
        free.discard("train.eval_batches")
    if choice.job.schedule.name == "constant":
        free.add("train.steps")  # no rate follows from it
    return [(key, here.get(key), there.get(key)) for key in keys if key not in free]


def _under(keys: Sequence[str], sections: Sequence[str]) -> Iterator[str]:
    return (key for key in keys if any(f"{key}.".startswith(f"{s}.") for s in sections))
