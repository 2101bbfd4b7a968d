"""Names of strategies to their files, and one way to get an engine."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from .. import accelerate_launch
from ..config import Job, JobError
from ..importing import import_module
from ..launchers import Ranks
from ..layout import Layout
from . import _ds_config
from .base import Engine, Outline, Strategy

if TYPE_CHECKING:
    from torch import nn

    from ..models.losses import Loss

_MODULES = {
    "single": "single",
    "ddp": "ddp",
    "local_sgd": "local_sgd",
    "fsdp": "fsdp",
    "zero1": "zero1",
    "zero2": "zero2",
    "zero3": "zero3",
    "pipeline": "pipeline",
    "2d": "two_d",
}
NAMES = tuple(_MODULES)
PARTS = ("name", "summary", "layout", "check", "period", "build")  # see `Strategy`


def get(name: str) -> Strategy:
    """The strategy of that name, or one's own by its module; JobError, listing the valid names,
    where there is none."""
    if name in _MODULES:
        return cast(Strategy, importlib.import_module(f".{_MODULES[name]}", __package__))
    if not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        valid = ", ".join(NAMES)
        raise JobError(f"strategy = {name!r}: unknown; valid: {valid}, package.module")
    module = import_module(f"strategy = {name!r}", name)
    missing = [part for part in PARTS if not hasattr(module, part)]
    if missing:
        raise JobError(f"strategy = {name!r}: the module has no {', no '.join(missing)}")
    return cast(Strategy, module)


def check_settings(job: Job, names: Sequence[str]) -> None:
    """JobError where there is no strategy of a name, or its section of the job names a file that is
    wrong: what can be known before the model is made. Imports no torch."""
    for name in names:
        get(name)
        _ds_config.check(job, name)


def plan(job: Job, name: str, nproc: int, outline: Outline) -> tuple[Layout, list[str]]:
    """The layout of one strategy on `nproc` processes, checked for this job, and warnings; raises
    Unsupported or JobError. Starts nothing."""
    strategy = get(name)
    layout = strategy.layout(job, nproc)
    return layout, strategy.check(job, layout, outline)


def check_launcher(job: Job, strategy: str, ranks: Ranks) -> Layout:
    """The layout on the processes that a launcher started; JobError or LayoutError where the job
    cannot run on so many, or a launcher's configuration says what the job does not."""
    accelerate_launch.check(job, strategy)
    layout = get(strategy).layout(job, ranks.world_size)
    if layout.world_size != ranks.world_size and ranks.world_size > 1:
        raise JobError(
            f"strategy = {strategy!r}: runs on {layout.world_size} process, "
            f"the launcher started {ranks.world_size}"
        )
    return layout


def open_engine(job: Job, strategy: str, layers: Sequence[nn.Module], loss: Loss) -> Engine:
    """An engine on the processes that a launcher started, for people who keep their own loop.

    Every rank calls it with the same job and the same initialised `layers` (equal on
    every rank: seed torch before making them). Joins the process group
    unless the caller has; `hybrid.processes.cleanup` leaves it. Lengths must be given in steps,
    `train.steps` and local SGD's `sync_every`, since the size of the data is not known here.
    Raises Unsupported or JobError before anything is built.
    """
    from .. import processes
    from ..models.layers import Layers
    from ._model import prepare_layers

    layers = layers if isinstance(layers, Layers) else Layers(layers)
    ranks = Ranks.from_env()
    outline = Outline(layers.sizes(), layers.cut_problem)
    layout = check_launcher(job, strategy, ranks)
    accelerate_launch.forget()
    get(strategy).check(job, layout, outline)
    if strategy != "single":
        processes.join(ranks, job.launch)
    return get(strategy).build(job, layout, prepare_layers(job, layers), loss)
