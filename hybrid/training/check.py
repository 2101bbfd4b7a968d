"""Checks a job before any process of a run starts: its model, its data and its trackers.

The check also finds the number of steps, how many parameters each layer holds and what it returns,
and it tries the job out on a few samples (`hybrid.training.tryout`)."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..job.errors import CheckFailed, JobError, RunError, Unsupported, tell_error
from ..job.schema import Job, resolve_lengths
from ..job.users_code import held_exit, passes
from ..job.variants import resolve
from ..launch.endings import tell
from ..launch.placement import Placement
from ..layout import Layout, LayoutError
from ..stages.checks import ModelSummary
from ..strategies import registry
from ..strategies.protocol import Layers
from .trackers import check_trackers
from .tryout.finding import SEVERAL, Finding, first_fatal
from .tryout.lone import lone_samples

if TYPE_CHECKING:
    from ..models.losses import Loss

Data = tuple[Sequence[Any], Sequence[Any]]  # train set and test set
SMALL = 50_000_000  # parameters of a model that is made with values to be tried out


@dataclasses.dataclass(frozen=True)
class CheckedJob:
    """Holds a job whose lengths are in optimizer steps, and what its check found.

    findings: of the try-out. num_samples: of the train set. lone_sample: the layers that cannot be
    trained on a micro-batch of one sample."""

    job: Job
    summary: ModelSummary
    findings: tuple[Finding, ...] = ()
    num_samples: int = 0
    lone_sample: str | None = None

    def require(self) -> "CheckedJob":
        """Return this; raises JobError with the first finding by which no run could be right."""
        if found := first_fatal(self.findings):
            raise JobError(found.text)
        return self

    def warnings(self, name: str | None = None) -> list[str]:
        """Return the warnings of the try-out for a run by its name; for all of them without one."""
        choice = resolve(self.job, name) if name else None
        warned = [found for found in self.findings if not found.fatal]
        kept = [f for f in warned if (f.touches(choice) if choice else not f.staged_by)]
        return [found.text if choice else found.show() for found in kept]

    def plan(self, name: str, nproc: int) -> tuple[Layout, list[str]]:
        """Return what `registry.plan` does for this job; what the try-out found raises Unsupported.

        The warnings are those of the job's settings alone."""
        layout, warnings = registry.plan(self.job, name, nproc, self.summary, self.num_samples)
        choice = resolve(self.job, name)
        for found in self.findings:
            if found.fatal and found.touches(choice):
                raise Unsupported(found.text)
        if self.lone_sample:
            lone_samples(choice, layout, self.num_samples, self.lone_sample)
        return layout, warnings


def check_job(job: Job, data: Data | None = None) -> CheckedJob:
    """Make the job's model and data once, check them, and free them again. Imports torch.

    data: the train and test sets, where the caller has made them already. Raises JobError where the
    job is wrong, and ModuleNotFoundError where a tracker's package is missing."""
    return look_at_job(job, data).require()


def look_at_job(job: Job, data: Data | None = None) -> CheckedJob:
    """Do what `check_job` does, but return what the try-out found, whatever that is.

    Raises CheckFailed where memory runs out."""
    with held_exit():
        try:
            return _look(job, data)
        except MemoryError as error:
            raise CheckFailed(f"checking the job: memory ran out: {tell_error(error)}") from error
        except BaseException as error:
            if passes(error) or isinstance(error, Exception):
                raise
            raise JobError(f"model.name = {job.model.name!r}: {tell_error(error)}") from error


def _look(job: Job, data: Data | None) -> CheckedJob:
    from ..data import build_data
    from ..data.check import check_samples, collate_warnings
    from ..engines.schedule import check_schedule
    from ..engines.summary import summarise
    from ..models.metrics import load_metrics
    from ..models.vector_functions import call_vector_functions_once
    from ..stages.shapes import boundaries
    from .sizes import check_sizes, require_passes
    from .tryout.run import try_out

    call_vector_functions_once()
    check_trackers(job.log.trackers)
    load_metrics(job)
    layers, loss = _build(job)
    train_set, test_set = data or build_data(job)
    check_samples(job, train_set, test_set)
    check_sizes(job, layers, train_set)
    job, num_samples = resolve_lengths(job, len(train_set)), len(train_set)
    check_schedule(job)
    layers.cut(train_set)
    summary = summarise(job, layers, boundaries=boundaries(layers, train_set))
    require_passes(job, summary.boundaries)
    layers, loss = _with_values(job, layers, loss)
    found = try_out(job, layers, loss, train_set, test_set)
    findings = (*found.findings, *(Finding(x, SEVERAL) for x in collate_warnings(train_set)))
    return CheckedJob(job, summary, findings, num_samples, found.lone_sample)


def check_on_rank_0(job: Job, strategy: str, data: Data, placement: Placement) -> list[str]:
    """Check the job on rank 0, which prints the warnings; collective.

    This is for ranks that another launcher started, and for a process alone. Returns the warnings
    of the try-out there. All ranks raise what rank 0 found: JobError, LayoutError, Unsupported or
    ModuleNotFoundError."""
    from ..launch.exchange import gather_objects

    problem, found_here = None, list[str]()
    if placement.rank == 0:
        try:
            checked = check_job(job, data)
            _, warnings = checked.plan(strategy, placement.world_size)
            print_warnings(f"{strategy}: {line}" for line in warnings)
            found_here = checked.warnings(strategy)
            print_warnings(found_here)
        except (JobError, LayoutError, Unsupported, ModuleNotFoundError) as error:
            problem = error
    for found in gather_objects(problem):
        if found is not None:
            raise found
    return found_here


def check_fingerprints(sets: dict[str, Sequence[Any]]) -> dict[str, str]:
    """Return the fingerprints of the sets that have one; collective.

    Raises RunError if ranks have others."""
    from ..launch.exchange import gather_objects

    mine = {n: str(s.fingerprint) for n, s in sets.items() if hasattr(s, "fingerprint")}
    for other, theirs in enumerate(gather_objects(mine)):
        if theirs != mine:
            raise RunError(f"rank {other} has other data: {theirs}, here {mine}")
    return mine


def print_warnings(lines: Iterable[str]) -> None:
    """Print each warning on a line of stderr."""
    for line in lines:
        tell(f"warning: {line}")


def _build(job: Job) -> "tuple[Layers, Loss]":
    """Make the job's model, on the meta device (without memory) where its code allows that."""
    import torch

    from ..models import HF, build_model, can_be_made_on_meta

    if can_be_made_on_meta(job) and not job.model.on_meta:
        try:
            with torch.device("meta"):
                return build_model(job)
        except Exception:  # some models of transformers need real numbers in their constructor
            if not job.model.name.startswith(HF):
                raise
    return build_model(job)


def _with_values(job: Job, layers: Layers, loss: "Loss") -> "tuple[Layers, Loss]":
    """Make the model again with values where that takes little memory, to try it out."""
    from ..models import build_model

    tensors = layers.tensors().values()
    if any(t.is_meta for t in tensors) and sum(t.numel() for t in tensors) <= SMALL:
        with warnings.catch_warnings(action="ignore"):  # they were given the first time
            if not job.model.on_meta:
                return build_model(job)
            for layer in layers:
                layers.fill(layer)
    return layers, loss
