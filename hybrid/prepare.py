"""What must be known of a job before any process starts: that its model and data can be made and
its trackers used, how many steps it takes, what its layers hold and return."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .config import Job, JobError, resolve_lengths
from .strategies.base import Outline
from .trackers import check_trackers

if TYPE_CHECKING:
    from .models.layers import Layers


@dataclasses.dataclass(frozen=True)
class Prepared:
    """`job` has its lengths in steps; `outline` is its model's."""

    job: Job
    outline: Outline


def prepare(job: Job) -> Prepared:
    """Make the model and the data once, here, and let them go; JobError where the job is wrong,
    ModuleNotFoundError where a tracker's package is missing. Imports torch."""
    from .data import build_data
    from .preflight import boundaries, input_problem

    check_trackers(job.log.trackers)
    layers = _outline(job)
    train_set, _ = build_data(job)
    sample_input = _first_input(job, train_set)
    _check_vocabulary(job, layers, train_set)
    return Prepared(
        job=resolve_lengths(job, len(train_set)),
        outline=Outline(
            layer_parameters=layers.sizes(),
            cut_problem=layers.cut_problem or input_problem(sample_input),
            boundaries=tuple(boundaries(layers, sample_input)),
        ),
    )


def _outline(job: Job) -> Layers:
    """The job's model: without memory, on the meta device, where its code is known to allow it."""
    import torch

    from .models import HF, build_model, can_be_made_on_meta

    if can_be_made_on_meta(job):
        try:
            with torch.device("meta"):
                return build_model(job)[0]
        except Exception:  # a family of transformers may need numbers to be made
            if not job.model.name.startswith(HF):
                raise
    return build_model(job)[0]


def _check_vocabulary(job: Job, layers: Layers, train_set: Any) -> None:
    """Token ids must have their rows in the embedding: torch would say so in the ranks."""
    import torch

    wanted = getattr(train_set, "vocab_size", None)
    embeddings = (m for m in layers.modules() if isinstance(m, torch.nn.Embedding))
    first = next(embeddings, None)
    if wanted and first is not None and first.num_embeddings < wanted:
        raise JobError(
            f"model.options.vocab_size = {first.num_embeddings}: the data's tokens need "
            f"{wanted} or more"
        )


def _first_input(job: Job, samples: Any) -> Any:
    """The input of the set's first sample."""
    try:
        sample_input, _ = samples[0]
    except Exception as error:  # a user's data set may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobError(
            f"data.name = {job.data.name!r}: sample 0 of the train set must be (input, target): "
            f"{reason}"
        ) from error
    return sample_input
