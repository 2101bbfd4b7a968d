"""Saves the state of a run as its job asks, and loads the one from which the run goes on."""

import contextlib
import dataclasses
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

from ..checkpoint.folders import prune, remove_unfinished
from ..checkpoint.load import Reader, load
from ..checkpoint.pieces import shares_of
from ..checkpoint.save import Snapshot, save
from ..checkpoint.state_hash import hash_of_pieces
from ..checkpoint.tensor_file import dtype_of
from ..data.loader import MicroBatch
from ..engines.protocol import Engine, OwnState
from ..engines.schedule import learning_rate
from ..job.errors import RunError
from ..job.file import to_dict
from ..job.schema import Job
from ..job.variants import Choice
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from ..records import ResumedFrom, SavedState
from .folder import CHECKPOINTS
from .resume import Chosen

PACKAGES = ("hybrid", "torch", "accelerate", "deepspeed")
RNG = "rng/"


@dataclasses.dataclass
class Checkpoints:
    """Saves and loads the state of one run.

    out: the run's folder, on every rank; None: the run saves nothing. chosen: what it goes on
    from."""

    job: Job
    choice: Choice
    engine: Engine
    placement: Placement
    out: Path | None
    chosen: Chosen | None = None
    newest: SavedState | None = None
    resumed_from: ResumedFrom | None = None

    def __post_init__(self) -> None:
        if self.out and self.placement.rank == 0:
            remove_unfinished(self.out / CHECKPOINTS)

    @property
    def saves(self) -> bool:
        """Tell whether the run saves its state while it trains."""
        return self.out is not None and self.job.checkpoint.every is not None

    @property
    def start(self) -> int:
        """Return the steps that were made before this run began."""
        return self.chosen.manifest.step if self.chosen else 0

    @property
    def values(self) -> Mapping[str, Any]:
        """Return what the manifest says of the checkpoint that the run goes on from, if any."""
        values: Mapping[str, Any] = self.chosen.manifest.values if self.chosen else {}
        return values

    def is_due(self, done: int) -> bool:
        """Tell whether the state is saved after `done` steps; the last one is always saved."""
        every = self.job.checkpoint.every
        if not self.saves or every is None:
            return False
        return done % every == 0 or done == self.job.train.steps

    def save(self, step: int, samples: int, record: Mapping[str, Any]) -> None:
        """Save the state after `step` optimizer steps; collective.

        record: what the run's record needs of the steps until now."""
        assert self.out is not None
        own = self.engine.own_state()
        values = {
            "samples": samples,
            "strategy": self.choice.strategy,
            "layout": self.engine.layout.to_dict(),
            "world_size": self.placement.world_size,
            "job": to_dict(self.job),
            "versions": _versions(),
            "rng": sorted(_read_generators()),
            "loss_scale": self.engine.loss_scale_state(),
            "schedule": {"next_lr": learning_rate(self.job, step)},
            "numbers_kept": self.engine.numbers_kept(),
            "record": dict(record),
        }
        tensors = {**own.tensors, **_read_generators()}
        shares = shares_of(self.engine.pieces())
        snapshot = Snapshot(step, shares, tensors, own.numbers, values)
        folder = self.out / CHECKPOINTS
        found = save(folder, snapshot, self.placement.rank, gather_objects)
        self.newest = SavedState(step, found)
        if self.placement.rank == 0:
            prune(folder, self.job.checkpoint.keep)

    def load(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Load the chosen checkpoint, and take the hash of the live state after it; collective.

        micro_batches: of the coming step."""
        assert self.chosen is not None
        folder, manifest, engine = self.chosen.folder, self.chosen.manifest, self.engine
        values, alike = manifest.values, self.chosen.is_alike(self.choice, self.engine.layout)
        shapes: dict[str, dict[str, Any]] = {}
        for (name, key), entry in manifest.entries.items():
            shapes.setdefault(name, {})[key] = dtype_of(entry.dtype), entry.shape
        engine.rehearse(micro_batches)
        engine.make_room(shapes, values.get("numbers_kept", []))
        load(folder, manifest, engine.pieces())
        own, generators = None, dict[str, torch.Tensor]()
        if alike:
            reader = Reader(folder, manifest)
            tensors = reader.own(self.placement.rank)
            reader.close()
            generators = {n: t for n, t in tensors.items() if n.startswith(RNG)}
            rest = {n: t for n, t in tensors.items() if n not in generators}
            own = OwnState(rest, values["ranks"][self.placement.rank]["numbers"])
        engine.begin_at(manifest.step, values["loss_scale"], own)
        _set_generators(generators)
        found = hash_of_pieces(engine.pieces())
        if found != manifest.state_hash:
            raise RunError(
                f"{folder}: the state has the hash {found} after loading, "
                f"{manifest.state_hash} in the manifest"
            )
        self.newest = SavedState(manifest.step, found)
        self.resumed_from = ResumedFrom(str(folder), manifest.step, found)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _read_generators() -> dict[str, torch.Tensor]:
    """Return the states of the generators that a model or an optimizer may draw from."""
    found = {f"{RNG}torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        found[f"{RNG}cuda"] = torch.cuda.get_rng_state()
    _, python, gauss = random.getstate()
    found[f"{RNG}python"] = torch.tensor([*python, *_as_bits(gauss)])
    state: Any = numpy.random.get_state()
    _, keys, place, has_gauss, cached = state
    numbers = [*keys.tolist(), place, *_as_bits(cached if has_gauss else None)]
    found[f"{RNG}numpy"] = torch.tensor(numbers)
    return found


def _set_generators(states: Mapping[str, torch.Tensor]) -> None:
    for name, state in states.items():
        kind = name.removeprefix(RNG)
        if kind == "torch":
            torch.set_rng_state(state)
        elif kind == "cuda" and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(state)
        elif kind == "python":
            *numbers, has, bits = state.tolist()
            random.setstate((3, tuple(numbers), _from_bits(has, bits)))
        elif kind == "numpy":
            *keys, place, has, bits = state.tolist()
            cached = _from_bits(has, bits)
            places: Any = "MT19937", numpy.array(keys, numpy.uint32), place, int(has), cached or 0.0
            numpy.random.set_state(places)


def _as_bits(value: float | None) -> Iterator[int]:
    """Yield whether there is a number, and its bits as an integer."""
    yield int(value is not None)
    yield struct.unpack("<q", struct.pack("<d", value or 0.0))[0]


def _from_bits(has: int, bits: int) -> float | None:
    return struct.unpack("<d", struct.pack("<q", bits))[0] if has else None
