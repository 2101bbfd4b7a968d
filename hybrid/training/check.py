"""Checks a job before any process of a run starts: its model, its data and its trackers.

The check also finds the number of steps, how many parameters each layer holds and what it returns.
"""

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from ..job.errors import JobError, Unsupported, first_line
from ..job.schema import Job, resolve_lengths
from ..launch.placement import Placement
from ..layout import LayoutError
from ..stages.checks import ModelSummary
from ..strategies.protocol import Layers
from .trackers import check_trackers

Data = tuple[Sequence[Any], Sequence[Any]]  # train set and test set


@dataclasses.dataclass(frozen=True)
class CheckedJob:
    """Holds a job whose lengths are in optimizer steps, and a summary of its model."""

    job: Job
    summary: ModelSummary


def check_job(job: Job, data: Data | None = None) -> CheckedJob:
    """Make the job's model and data once, check them, and free them again. Imports torch.

    data: the train and test sets, where the caller has made them already. Raises JobError where the
    job is wrong, and ModuleNotFoundError where a tracker's package is missing."""
    from ..data import build_data
    from ..models.metrics import load_metrics
    from ..models.vector_functions import call_vector_functions_once
    from ..stages.shapes import boundaries, input_problem

    call_vector_functions_once()
    check_trackers(job.log.trackers)
    load_metrics(job)
    layers = _build_layers(job)
    train_set, _ = data or build_data(job)
    sample_input = _first_input(job, train_set)
    _check_vocabulary(job, layers, train_set)
    return CheckedJob(
        job=resolve_lengths(job, len(train_set)),
        summary=ModelSummary(
            layer_parameters=layers.sizes(),
            cut_problem=layers.cut_problem or input_problem(sample_input),
            boundaries=tuple(boundaries(layers, sample_input)),
        ),
    )


def check_on_rank_0(job: Job, strategy: str, data: Data, placement: Placement) -> None:
    """Check the job on rank 0, which prints the warnings; collective.

    This is for ranks that another launcher started, and for a process alone. All ranks raise what
    rank 0 found: JobError, LayoutError, Unsupported or ModuleNotFoundError."""
    from ..launch.exchange import gather_objects
    from ..strategies import registry

    problem = None
    if placement.rank == 0:
        try:
            checked = check_job(job, data)
            nproc = placement.world_size
            _, warnings = registry.plan(checked.job, strategy, nproc, checked.summary)
            print_warnings(f"{strategy}: {line}" for line in warnings)
        except (JobError, LayoutError, Unsupported, ModuleNotFoundError) as error:
            problem = error
    for found in gather_objects(problem):
        if found is not None:
            raise found


def print_warnings(lines: Iterable[str]) -> None:
    """Print each warning on a line of stderr."""
    for line in lines:
        print(f"hybrid: warning: {line}", file=sys.stderr)


def _build_layers(job: Job) -> Layers:
    """Make the job's model, on the meta device (without memory) where its code allows that."""
    import torch

    from ..models import HF, build_model, can_be_made_on_meta

    if can_be_made_on_meta(job):
        try:
            with torch.device("meta"):
                return build_model(job)[0]
        except Exception:  # some models of transformers need real numbers in their constructor
            if not job.model.name.startswith(HF):
                raise
    return build_model(job)[0]


def _check_vocabulary(job: Job, layers: Layers, train_set: Any) -> None:
    """Raise JobError if the first embedding has fewer rows than the data has token ids.
    Without this check torch would raise in the ranks, and would not name the job's key."""
    import torch

    wanted = getattr(train_set, "vocab_size", None)
    first = next((m for m in layers.modules() if isinstance(m, torch.nn.Embedding)), None)
    if wanted and first is not None and first.num_embeddings < wanted:
        raise JobError(
            f"model.options.vocab_size = {first.num_embeddings}: the data's tokens need "
            f"{wanted} or more"
        )


def _first_input(job: Job, samples: Any) -> Any:
    """Return the input of the first sample; raises JobError if it is not (input, target)."""
    try:
        sample_input, _ = samples[0]
    except Exception as error:  # a user's data set may raise anything
        raise JobError(
            f"data.name = {job.data.name!r}: sample 0 of the train set must be (input, target): "
            f"{first_line(error)}"
        ) from error
    return sample_input
