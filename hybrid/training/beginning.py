"""Begins a run in one rank: decides from where it goes on, and makes its engine."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import records
from ..data.targets import targets_per_sample
from ..data.workers import AHEAD
from ..engines.protocol import Engine
from ..job.errors import JobError, Refused
from ..job.schema import Job
from ..job.variants import Choice
from ..launch.devices import require_device
from ..launch.exchange import gather_objects
from ..launch.failures import MEETING, RankStatus
from ..launch.garbage import collect_as_usual
from ..launch.placement import OWN, Placement
from ..launch.process_group import join_process_group
from ..measure.clock import Instruments
from ..models.shared import build_shared
from ..records import Record
from ..strategies import registry
from .check import print_warnings
from .folder import begin_run, keep_steps
from .hosts import check_hosts
from .resume import Chosen, Start, decide, read_chosen, tell_start


def make_instruments(
    job: Job, strategy: str, placement: Placement, chosen: Chosen | None
) -> Instruments:
    """Make the instruments of the steps that are left."""
    assert job.train.steps is not None
    left = job.train.steps - (chosen.manifest.step if chosen else 0)
    period = registry.steps_between_syncs(job, strategy)
    ahead = AHEAD * job.data.workers
    return Instruments(left, period, placement.device, job.train.compile, ahead)


def build(
    job: Job, strategy: str, placement: Placement, status: RankStatus, samples: Sequence[Any]
) -> tuple[Engine, int | None, dict[str, str], dict[str, Any] | None]:
    """Make the model and put it under the engine.

    Returns this, the targets of each sample where the train set tells them, the names of the final
    weights, and where the first ones came from."""
    status.set("building the model")
    layers, loss = build_shared(job, placement)
    status.parameters = sum(p.numel() for p in layers.names() if p.requires_grad)
    status.set("building the engine")
    names, weights_from = layers.saved_names(), layers.weights_from
    engine = registry.open_engine(job, strategy, layers, loss, placement, samples)
    collect_as_usual()
    status.held = engine.num_held
    return engine, targets_per_sample(samples, loss), names, weights_from


def meet(placement: Placement, job: Job, status: RankStatus) -> Placement:
    """Join the other ranks of the run, if any, and tell them from now on what this one does.

    Raises Refused where a rank cannot have the device that the job asks for."""
    if placement.world_size == 1:
        require_device(placement)
        return placement
    status.set(MEETING)
    placement = join_process_group(placement, job.launch)
    status.start_heartbeat(placement)
    return placement


def decide_together(
    choice: Choice,
    placement: Placement,
    out: Path | None,
    resume: Path | str | None,
    until: int | None = None,
) -> Start:
    """Return how the run begins, which rank 0 decides; collective.

    Raises JobError on all ranks, also where hosts do not share what the run needs of them."""
    if placement.launcher == OWN:  # our own launcher has decided before it started us
        return Start(read_chosen(Path(resume), choice)) if resume else Start()
    start, problem = Start(), None
    if placement.rank == 0:
        try:
            start = decide(out, resume, choice)
        except JobError as error:
            problem = Refused(str(error))
        tell_start(start)
    ended = records.to_dict(start.ended) if start.ended else None
    mine = dataclasses.replace(start, ended=None), ended, problem
    start, ended, problem = gather_objects(mine)[0]
    if problem:
        raise problem
    start = dataclasses.replace(start, ended=records.from_dict(Record, ended) if ended else None)
    check_hosts(choice.job, placement, out, start, until)
    return start


def begin_record(
    job: Job, choice: Choice, placement: Placement, out: Path | None, start: Start
) -> list[str]:
    """Begin the record of a run that another launcher started, and return what to warn of."""
    if out is None or placement.rank > 0:
        return []
    if placement.launched:
        return [*start.notes]
    chosen = start.chosen
    begin_run(out, job, choice, chosen.folder if chosen else None)
    lines = keep_steps(out, chosen.folder, chosen.manifest.step) if chosen else []
    print_warnings(lines)
    return [*start.notes, *lines]
