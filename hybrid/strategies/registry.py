"""This module finds a strategy's file by its name, and opens engines."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ..engines.deepspeed_config import check_ds_config
from ..engines.protocol import Engine
from ..engines.refusals import check_cuts, check_shares
from ..job.errors import JobError, Unsupported, tell_error
from ..job.imports import import_module
from ..job.schema import Job
from ..job.users_code import held_exit, passes
from ..job.variants import Choice, resolve
from ..launch.accelerate_env import check_configuration
from ..launch.placement import OWN, Placement, find_placement
from ..layout import Layout, LayoutError
from ..stages.checks import ModelSummary
from . import protocol
from .protocol import REQUIRED, Strategy

if TYPE_CHECKING:
    from torch import nn

    from ..models.layers import Layers
    from ..models.losses import Loss

NAMES = ("single", "ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d")
EVERY_RANK = (
    "hybrid.cli",
    "hybrid.training.run",
    "hybrid.training.loop",
    "hybrid.engines.base",
    "hybrid.engines.optimizer_trial",
    "hybrid.engines.replicas",
    "hybrid.engines.summary",
    "hybrid.launch.freed_memory",
    "hybrid.models.brought",
    "hybrid.models.hf.probe",
    "hybrid.measure.machine:installation",  # git and others, once for all ranks
    "encodings.idna",  # a rank meets the others by the name of a host
    "torch._dynamo",  # an optimizer imports it when it is made, which takes a second
)
_FILES = {"zero1": "zero", "zero2": "zero", "zero3": "zero", "2d": "two_d"}  # unlike their names


def get(name: str, variants: Sequence[str] = ()) -> Strategy:
    """Return the strategy of a name, or a user's own by its module.
    Raises JobError, which lists the valid names and those of `variants`, if there is none."""
    if name in NAMES:
        module = importlib.import_module(f".{_FILES.get(name, name)}", __package__)
        return cast(Strategy, getattr(module, name, module))  # `zero` holds three
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        valid = ", ".join((*NAMES, "package.module", *variants))
        raise JobError(f"strategy = {name!r}: unknown; valid: {valid}")
    module = import_module(f"strategy = {name!r}", name)
    missing = [part for part in REQUIRED if not hasattr(module, part)]
    if missing:
        raise JobError(f"strategy = {name!r}: the module has no {', no '.join(missing)}")
    return cast(Strategy, module)


def modules(name: str, job: Job | None = None) -> list[str]:
    """Return the modules that the ranks of a strategy import.
    job: with its settings, None: with the defaults."""
    own = getattr(get(name), "modules", ())
    return [*EVERY_RANK, *(own(job) if callable(own) else own)]


def engine(name: str, job: Job) -> str:
    """Return what does a strategy's work: one of `hybrid.engines`, or a user's own module."""
    own = [module for module in modules(name, job) if module not in EVERY_RANK]
    return next((module for module in own if module.startswith("hybrid.engines.")), name)


def check_settings(job: Job, names: Sequence[str]) -> None:
    """Check what can be known before the model is made; imports no torch.

    names: of strategies, and of the job's variants. Raises JobError if there is no strategy of a
    name, or if its section of the job names a file that is wrong."""
    for name in names:
        choice = resolve(job, name)
        try:
            get(choice.strategy, tuple(job.variant))
            check_ds_config(choice.job, choice.strategy)
        except JobError as error:
            if choice.variant_of:
                raise JobError(f"variant.{name}: {error}") from None
            raise


def plan(
    job: Job, name: str, nproc: int, summary: ModelSummary, num_samples: int | None = None
) -> tuple[Layout, list[str]]:
    """Return the layout of a strategy or variant on `nproc` processes, checked, and warnings.

    num_samples: of the train set. Raises Unsupported, LayoutError or JobError; starts nothing."""
    layout, warnings = find_layout(job, name, nproc, num_samples)
    choice = resolve(job, name)
    try:
        return layout, [*warnings, *_check(choice.job, choice.strategy, layout, summary)]
    except (JobError, LayoutError) as error:
        raise of_variant(choice, error) from None


def find_layout(
    job: Job, name: str, nproc: int, num_samples: int | None = None
) -> tuple[Layout, list[str]]:
    """Return the layout on `nproc` processes, by the job alone, and warnings; imports no torch.

    num_samples: of the train set, where it is known. Raises Unsupported, LayoutError or JobError.
    """
    choice = resolve(job, name)
    try:
        layout = _layout(choice, nproc)
        return layout, check_shares(choice.job, choice.strategy, layout, num_samples)
    except (JobError, LayoutError) as error:
        raise of_variant(choice, error) from None


def _layout(choice: Choice, nproc: int) -> Layout:
    strategy = get(choice.strategy)
    try:
        with held_exit():
            return strategy.layout(choice.job, nproc)
    except (JobError, LayoutError, Unsupported):
        raise
    except BaseException as error:  # a user's own may raise anything
        if passes(error) or choice.strategy in NAMES:
            raise
        given = f"strategy = {choice.strategy!r}: its layout"
        raise JobError(f"{given} raised {tell_error(error)}") from error


def of_variant(choice: Choice, error: ValueError) -> ValueError:
    """Return an error of the job, with the name of the variant that it is about in front."""
    return type(error)(f"variant.{choice.name}: {error}") if choice.variant_of else error


def _check(job: Job, name: str, layout: Layout, summary: ModelSummary) -> list[str]:
    """Check a job for a strategy, its DeepSpeed file included, and return warnings."""
    check_ds_config(job, name)
    if layout.world_size > 1:
        check_cuts(job, name, summary, ["ranks"])
    return protocol.check(get(name), job, layout, summary)


def steps_between_syncs(job: Job, name: str) -> int:
    """Return the optimizer steps after which a strategy's communication repeats."""
    return protocol.steps_between_syncs(get(name), job)


def place(job: Job, strategy: str, placement: Placement) -> Placement:
    """Return a launched process's placement, with the strategy's layout on all processes.

    Raises JobError or LayoutError if the job cannot run on so many, or if accelerate's
    configuration contradicts the job."""
    choice = resolve(job, strategy)
    job, strategy = choice.job, choice.strategy
    check_configuration(job, strategy)
    layout = get(strategy).layout(job, placement.world_size)
    if layout.world_size != placement.world_size > 1:
        raise JobError(
            f"strategy = {strategy!r}: runs on {layout.world_size} process, "
            f"the launcher started {placement.world_size}"
        )
    asked = job.launch.device
    return dataclasses.replace(placement, layout=layout, device_asked=asked)


def open_engine(
    job: Job,
    strategy: str,
    layers: Sequence[nn.Module] | nn.Module,
    loss: Loss,
    placement: Placement | None = None,
    samples: Sequence[Any] | None = None,
) -> Engine:
    """Build an engine on the processes that a launcher started, for people with their own loop.

    Every rank calls it with the same job and the same initialised `layers`, or any module: seed
    torch before making them. It joins the process group unless the caller has. `placement` then
    says where this rank stands; left out, it is found from the launcher's variables.
    `hybrid.cleanup` leaves the group. Where it joins, this process waits `launch.setup_timeout_s`
    for others until the engine is built, and from then on `launch.collective_timeout_s`, unless
    the job compiles. samples: the train set, on two of which a module is tried out
    where it must be cut into stages. Lengths must be given in steps (`train.steps` and local SGD's
    `sync_every`), since the size of the data is not known here. Raises Unsupported or JobError
    before anything is built."""
    from ..engines.summary import summarise
    from ..launch.process_group import hide_accelerate_configuration
    from ..models.brought import as_layers
    from ..models.losses import as_loss
    from ..models.own_loss import OwnLoss
    from ..models.vector_functions import call_vector_functions_once

    call_vector_functions_once()
    choice = resolve(job, strategy)
    job, strategy = choice.job, choice.strategy
    loss = as_loss(loss)
    layers = as_layers(layers, own_loss=isinstance(loss, OwnLoss))
    placement = place(job, strategy, placement or find_placement())
    if placement.layout.pp > 1:
        layers.cut(samples)
    summary = summarise(job, layers, tried=placement.launcher == OWN)  # by who started this rank
    hide_accelerate_configuration()
    _check(job, strategy, placement.layout, summary)
    return _build(job, strategy, placement, layers, loss)


def _build(job: Job, strategy: str, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Build the engine of a job that has been checked, among the other ranks."""
    import torch.distributed as dist

    from ..engines.layers import prepare_layers, prepare_loss
    from ..engines.precision import forbid_tf32
    from ..launch.freed_memory import returned_when_freed
    from ..launch.process_group import join_process_group, name_device, set_timeouts

    joins = strategy != "single" and not dist.is_initialized()
    if strategy != "single":
        placement = join_process_group(placement, job.launch)
        name_device(placement)
    layers, loss = prepare_layers(job, layers), prepare_loss(job, loss)
    notes = forbid_tf32()
    parameters = sum(p.numel() for p in layers.names())
    with returned_when_freed(parameters, placement.layout.shard):
        engine = get(strategy).build(job, placement, layers, loss)
    if layers.first_values is not None:
        layers.first_values.close()
    engine.notes.extend(notes)
    if joins and not job.train.compile:  # the first step of torch.compile takes ranks unlike times
        set_timeouts(job.launch.collective_timeout_s)
    return engine
