"""Saves the state of a run as its job asks, and loads the one from which the run goes on."""

import contextlib
import dataclasses
import functools
import random
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

from ..checkpoint.folders import prune, remove_unfinished
from ..checkpoint.load import Reader, load
from ..checkpoint.names import CHECKPOINTS
from ..checkpoint.pieces import shares_of
from ..checkpoint.save import RNG, StateHashes, save
from ..checkpoint.snapshot import Snapshot, Unfilled, fill, make_room
from ..checkpoint.state_hash import hash_of_pieces
from ..checkpoint.tensors import dtype_of
from ..checkpoint.writer import Writer
from ..data.loader import MicroBatch
from ..engines.protocol import Engine, OwnState
from ..engines.schedule import learning_rate
from ..job.errors import JobError, RunError
from ..job.file import to_dict
from ..job.schema import Job
from ..job.variants import Choice
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from ..records import ResumedFrom, SavedState
from .best import BestScores
from .folder import belongs_to
from .resume import Chosen

PACKAGES = ("hybrid", "torch", "accelerate", "deepspeed")


@dataclasses.dataclass
class Checkpoints:
    """Saves and loads the state of one run.

    out: the run's folder, on every rank; None: the run saves nothing. chosen: what it goes on
    from. until: the run ends after so many steps, saved, and another one goes on from there."""

    job: Job
    choice: Choice
    engine: Engine
    placement: Placement
    out: Path | None
    chosen: Chosen | None = None
    until: int | None = None
    newest: SavedState | None = None  # that can be loaded again, of another run's folder too
    committed: SavedState | None = None  # the newest in the run's own folder
    resumed_from: ResumedFrom | None = None

    def __post_init__(self) -> None:
        asked = self.job.checkpoint
        if self.out and self.placement.rank == 0:
            remove_unfinished(self.out / CHECKPOINTS)
        saves = self.out is not None and asked.every is not None
        limits = self.placement.world_size, self.job.launch.setup_timeout_s
        self._writer = Writer(*limits) if saves and asked.asynchronous else None
        # What else a snapshot has is copied at once; this, while the next gradients are computed.
        stepper = self.engine.stepper() if self._writer else None
        self._copies_beside = stepper is not None
        if self._writer and stepper:
            writer = self._writer
            stepper.register_step_pre_hook(lambda *_: writer.wait_for_copy())
        self._copied: Snapshot | None = None  # what the writer writes, or wrote last
        self._due = threading.Event()  # a save needs the room for copies, all of it touched or not
        self._saving = 0  # the step of it
        self._last: StateHashes | None = None  # by which the next is known to be another
        self._scores = BestScores(asked.best) if asked.best else None
        if self.chosen and self.start == self.job.train.steps:
            self._require_same_end(self.chosen)
        if saves and self.placement.rank == 0 and self.start == self.job.train.steps:
            self._tidy(self.start)  # the run before may have ended between its last save and this

    def _require_same_end(self, chosen: Chosen) -> None:
        """Require the receipt of a run that has no step left which could show anything."""
        if "receipt" in self.saved_record and chosen.is_alike(self.choice, self.engine.layout):
            return
        raise JobError(
            f"train.steps = {self.start}: {chosen.folder} is after as many steps, and has no "
            f"receipt of {self.choice.strategy} on {self.placement.world_size} processes at their "
            f"end; valid: {self.start + 1} or more, an earlier checkpoint, or what saved this one"
        )

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

    @property
    def saved_record(self) -> Mapping[str, Any]:
        """Return what that manifest says for the run's record; another program's says nothing."""
        record: Mapping[str, Any] = self.values.get("record", {})
        return record

    @property
    def end(self) -> int:
        """Return the steps after which this run ends."""
        return self.until or self.job.train.steps or 0

    def is_due(self, done: int) -> bool:
        """Tell whether the state is saved after `done` steps; the last one is always saved."""
        every = self.job.checkpoint.every
        if self.out is not None and done == self.until:
            return True
        if not self.saves or every is None:
            return False
        return done % every == 0 or done == self.job.train.steps

    def save(self, step: int, samples: int, record: Mapping[str, Any], changed: bool) -> None:
        """Save the state after `step` optimizer steps; collective.

        record: what the run's record needs of the steps until now, as JSON. changed: the steps
        since the last save must have changed the state. Where saving is asynchronous, it goes on
        after this call, and `check` and `wait` say how it ended. Raises RunError or NoRoom."""
        assert self.out is not None
        self._due.set()
        self.wait()
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
            "optimizer_numbers": self.engine.optimizer_numbers(),
            "record": dict(record),
        }
        tensors = {**own.tensors, **_read_generators()}
        shares = shares_of(self.engine.pieces())
        snapshot = Snapshot(step, shares, tensors, own.numbers, values)
        if self._scores:
            self._scores.note(step, record["evals"])
        rest = self._last if changed else None, functools.partial(self._tidy, step)
        folder, rank = self.out / CHECKPOINTS, self.placement.rank
        if self._writer is None:
            self._take(step, save(folder, snapshot, rank, gather_objects, *rest))
            return
        later: list[Unfilled] | None = [] if self._copies_beside else None
        self._copied, self._saving = snapshot.copy(self._copied, later), step
        work = functools.partial(save, folder, self._copied, rank, self._writer.gather, *rest)
        self._writer.start(work, functools.partial(fill, later or []))

    def check(self) -> None:
        """Note a save that has ended meanwhile; raises RunError or NoRoom if it failed.

        After the first step, memory for the copies is taken, beside the training."""
        if self._writer:
            self._take(self._saving, self._writer.take(wait=False))
            if self._copied is None:
                self._copied = make_room(shares_of(self.engine.pieces()))
                self._writer.start(functools.partial(self._copied.touch, self._due.is_set))

    def wait(self) -> None:
        """Wait until what is being saved is committed; raises RunError or NoRoom if it failed."""
        if self._writer:
            self._take(self._saving, self._writer.take(wait=True))

    def _take(self, step: int, saved: StateHashes | None) -> None:
        if saved is not None:
            self._last, self.newest = saved, SavedState(step, saved.state_hash)
            self.committed = self.newest

    def _tidy(self, step: int) -> None:
        """Remove the checkpoints that the job does not keep, after that of `step` is committed."""
        assert self.out is not None
        folder, keep = self.out / CHECKPOINTS, self.job.checkpoint.keep
        best = self._scores.best(folder, step) if self._scores and keep is not None else ()
        prune(folder, keep, best, step)

    def load(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Load the chosen checkpoint, and take the hash of the live state after it; collective.

        micro_batches: of the coming step."""
        assert self.chosen is not None
        folder, manifest, engine = self.chosen.folder, self.chosen.manifest, self.engine
        values, alike = manifest.values, self.chosen.is_alike(self.choice, self.engine.layout)
        # An emulation has the layout of the ranks that it plays in one process.
        alike = alike and values["world_size"] == self.placement.world_size
        alike = alike and len(values.get("ranks", ())) == values["world_size"]
        shapes: dict[str, dict[str, Any]] = {}
        for (name, key), entry in manifest.entries.items():
            shapes.setdefault(name, {})[key] = dtype_of(entry.dtype), entry.shape
        engine.rehearse(micro_batches)
        engine.make_room(shapes, values.get("numbers_kept", []))
        load(folder, manifest, engine.pieces())
        engine.set_optimizer_numbers(values.get("optimizer_numbers", {}))
        own, generators = None, dict[str, torch.Tensor]()
        with contextlib.closing(Reader(folder, manifest)) as reader:
            if alike:
                tensors = reader.own(self.placement.rank)
                generators = {name: tensors[name] for name in tensors if name.startswith(RNG)}
                own = OwnState(tensors, values["ranks"][self.placement.rank]["numbers"])
            engine.begin_at(manifest.step, values["loss_scale"], own)
        _set_generators(generators)
        found = hash_of_pieces(engine.pieces())
        if found != manifest.state_hash:
            raise RunError(
                f"{folder}: the state has the hash {found} after loading, "
                f"{manifest.state_hash} in the manifest"
            )
        self._last, self.newest = StateHashes(found), SavedState(manifest.step, found)
        if self.out and belongs_to(folder, self.out):
            self.committed = self.newest
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
