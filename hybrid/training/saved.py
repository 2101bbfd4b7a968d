"""Finds the weights that a command was given, and the job that they belong to.

`hybrid eval`, `export` and `generate` take a checkpoint's folder, a run's folder, or its final
weights. The job is the one in that folder, unless the command line names another; what that folder
names to be imported needs `--trust`. No torch here, so that what cannot be used is refused soon."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.folders import find_unless_final, verify
from ..checkpoint.inspection import is_checkpoint
from ..checkpoint.manifest import Manifest, read_manifest
from ..checkpoint.names import CHECKPOINTS, VALID
from ..checkpoint.weights import ABOUT, verify_weights
from ..data import SOURCES
from ..job.errors import JobError, tell_error
from ..job.file import load_job
from ..job.imports import check_name
from ..job.reading import read_json
from ..job.schema import Job
from ..job.trust import require_trust, without_cache
from ..models import check_model_name, without_weights

if TYPE_CHECKING:
    from ..checkpoint.sources import Weights

JOB = "job.json"
MOST_STEPS = 2**53  # what a number of JSON holds exactly
_WRONG = OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError


@dataclasses.dataclass(frozen=True)
class JobFrom:
    """Says where the job comes from, if not from the folder, and what of it is trusted.

    job: a file on the command line. overrides: `--set`. trust: code that the folder names."""

    job: Path | None = None
    overrides: Sequence[str] = ()
    trust: bool = False


@dataclasses.dataclass(frozen=True)
class Saved:
    """Holds where weights are, verified, and the job that they belong to.

    manifest: of a checkpoint; None: they are a run's final weights. strategy: under which they were
    trained. notes: which newer checkpoints were passed over, and why."""

    folder: Path
    job: Job
    strategy: str
    step: int | None
    manifest: Manifest | None = None
    notes: Sequence[str] = ()

    def open(self) -> "Weights":
        """Open the weights; the caller closes them."""
        from ..checkpoint.sources import CheckpointWeights, open_final  # torch comes with it

        if self.manifest is None:
            return open_final(self.folder)
        return CheckpointWeights(self.folder, self.manifest)

    def describe(self) -> dict[str, Any]:
        """Return what a result says of where its weights came from."""
        found: dict[str, Any] = {"path": str(self.folder), "step": self.step}
        return found | {"state_hash": self.manifest and self.manifest.state_hash}


def find_saved(path: Path, given: JobFrom, verified: bool = False) -> Saved:
    """Return the weights at `path`: of a run, those of the newest checkpoint that is whole.

    verified: another process has verified them. Raises JobError where there are none, where they
    are damaged, or where the folder's job names code that is not trusted."""
    try:
        return _find_saved(path, given, verified)
    except JobError:
        raise
    except _WRONG as error:  # what a damaged folder has makes readers raise all kinds of errors
        raise JobError(f"{path}: cannot be read: {tell_error(error)}; {VALID}") from error


def _find_saved(path: Path, given: JobFrom, verified: bool) -> Saved:
    folder, manifest, notes = _find(path, verified)
    if manifest is not None:
        values = manifest.values
        job = _job(folder, values["job"], given)
        return Saved(folder, job, values["strategy"], manifest.step, manifest, notes)
    verify_weights(folder)
    about = read_json(folder / ABOUT, str(folder / ABOUT))
    job = _job(folder, folder.parent.parent / JOB, given)
    step = about.get("step")
    step = step if type(step) is int and 0 <= step < MOST_STEPS else None
    return Saved(folder, job, str(about.get("strategy")), step, notes=notes)


def _find(path: Path, verified: bool) -> tuple[Path, Manifest | None, list[str]]:
    """Return the folder of the weights, the manifest of a checkpoint's, and notes."""
    if not path.is_dir():
        raise JobError(f"{path}: is no folder; {VALID}")
    if is_checkpoint(path):
        manifest, problems = (read_manifest(path), []) if verified else verify(path)
        if manifest is None or problems:
            raise JobError(f"{path}: cannot be used: {problems[0]}")
        return path, manifest, []
    if (path / ABOUT).is_file():
        return path, None, []
    below = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    found, notes = find_unless_final(below)
    if found:
        return *found, notes
    if (below / "final" / ABOUT).is_file() or ((path / JOB).is_file() and not notes):
        return below / "final", None, notes
    if notes:
        raise JobError(f"{path}: no checkpoint can be used: {'; '.join(notes)}")
    runs = sorted(p.parents[1] for p in path.glob(f"*/{CHECKPOINTS}/*") if p.is_dir())
    more = f"; runs below it: {', '.join(map(str, dict.fromkeys(runs)))}" if runs else ""
    raise JobError(f"{path}: no run's folder, it has no {JOB}, and no checkpoint{more}; {VALID}")


def _job(folder: Path, source: Any, given: JobFrom) -> Job:
    """Load the job from the command line's file, else from what the folder has of it."""
    if given.job is not None:
        job = load_job(given.job, given.overrides)
    else:
        if isinstance(source, Path) and not source.is_file():
            raise JobError(f"{folder}: there is no {source}, with its job; valid: --job JOB")
        job = load_job(source, given.overrides)
        if not given.trust:
            require_trust(str(folder), job, given.overrides)
            job = without_cache(job, given.overrides)
    check_model_name(job.model.name)
    check_name("data", job.data.name, SOURCES)
    return without_weights(job)
