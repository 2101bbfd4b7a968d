"""Chooses the checkpoint from which a run goes on, and says in what its job was another one."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..job.errors import JobError
from ..job.file import flatten, to_dict
from ..job.schema import Job
from ..job.variants import Choice
from ..layout import Layout
from .folder import CHECKPOINTS

AUTO = "auto"
# What the state or the samples follow from. Other keys may change: a warning names each.
_THE_SAME = ("model", "data.name", "data.options", "optimizer.name", "optimizer.options",
             "train.global_batch", "train.seed")  # fmt: skip
_FREE = ("checkpoint", "launch", "log", "variant", "proxy", "parallel", "strategy", "data.workers",
         "train.micro_batches", "train.epochs", "train.eval_every")  # fmt: skip


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


def choose(out: Path, resume: str | Path, job: Job, verified: bool = False) -> Chosen | None:
    """Return the checkpoint that `resume` asks for: "auto", the folder of one, or that of a run.

    "auto" looks in `out` alone, and returns None where there is none. job: with its lengths in
    steps. verified: another process has verified it. Raises JobError where what is named cannot be
    used, or where no checkpoint of several is whole."""
    given, path = f"--resume {resume}", Path(resume)
    if resume == AUTO:
        _clear(out / CHECKPOINTS)
        found, skipped = _newest(out / CHECKPOINTS)
        if found is None and skipped:
            raise JobError(f"{given}: no checkpoint can be used; {'; '.join(skipped)}")
        return found and _compared(found, job, skipped)
    from ..checkpoint.folders import list_checkpoints, verify
    from ..checkpoint.manifest import MANIFEST, read_manifest

    if not path.is_dir():
        raise JobError(f"{given}: is no folder; valid: auto, a run's folder, a step's folder in it")
    if (path / MANIFEST).exists():
        if verified:
            return _compared(Chosen(path, read_manifest(path)), job, [])
        manifest, problems = verify(path, whole=True)
        if problems:
            raise JobError(f"{given}: cannot be used: {problems[0]}")
        return _compared(Chosen(path, manifest), job, _later(path, out / CHECKPOINTS))
    below = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not list_checkpoints(below):
        raise JobError(
            f"{given}: holds no checkpoint; valid: auto, a run's folder, a step's folder"
        )
    found, skipped = _newest(below)
    if found is None:
        raise JobError(f"{given}: no checkpoint can be used; {'; '.join(skipped)}")
    return _compared(found, job, skipped)


def _later(folder: Path, checkpoints: Path) -> list[str]:
    """Say that a run leaves later checkpoints of its own folder behind it, where it does."""
    from ..checkpoint.folders import list_checkpoints

    names = [path.name for path in list_checkpoints(checkpoints)]
    if not names or folder.resolve() != (checkpoints / folder.name).resolve():
        return []
    found = f"{names[0]} is there too: until this run has saved that step, `--resume {AUTO}` goes"
    return [f"{found} on from it, not from what this run saves"] if names[0] > folder.name else []


def _clear(checkpoints: Path) -> None:
    """Clear away what the run before has left unfinished."""
    from ..checkpoint.folders import remove_unfinished

    remove_unfinished(checkpoints)


def _newest(checkpoints: Path) -> tuple[Chosen | None, list[str]]:
    """Return the newest checkpoint that verifies, and why newer ones do not."""
    from ..checkpoint.folders import list_checkpoints, verify

    skipped: list[str] = []
    for folder in list_checkpoints(checkpoints):
        manifest, problems = verify(folder, whole=True)
        if not problems:
            return Chosen(folder, manifest), skipped
        skipped.append(f"{folder.name} is skipped: {problems[0]}")
    return None, skipped


def _compared(found: Chosen, job: Job, notes: Sequence[str]) -> Chosen:
    """Add what has changed in the job; raises JobError where the state would mean another thing."""
    here, there = dict(flatten(to_dict(job))), dict(flatten(found.manifest.values["job"]))
    changed = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    for key in _under(changed, _THE_SAME):
        raise JobError(
            f"{key} = {here.get(key)!r}: the checkpoint {found.folder} is of a run with "
            f"{there.get(key)!r}; a run goes on with the model, the data, the batch and the seed "
            "that it had"
        )
    if found.manifest.step > (job.train.steps or 0):
        raise JobError(
            f"train.steps = {job.train.steps}: the checkpoint {found.folder} is after "
            f"{found.manifest.step} steps"
        )
    free = set(_under(changed, _FREE))
    more = [
        f"{key} = {here.get(key)!r} from step {found.manifest.step} on; it was {there.get(key)!r}"
        for key in changed
        if key not in free
    ]
    return dataclasses.replace(found, notes=[*notes, *more])


def _under(keys: Sequence[str], sections: Sequence[str]) -> Iterator[str]:
    return (key for key in keys if any(f"{key}.".startswith(f"{s}.") for s in sections))
