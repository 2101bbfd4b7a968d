"""Plays one rank of a run: its own engine makes three steps on tensors without values."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.pieces import WEIGHT, Piece
from ..data.batches import BatchPlan
from ..data.loader import MicroBatch
from ..data.steps import StepLoader
from ..data.targets import targets_per_sample
from ..engines.base import BaseEngine
from ..engines.protocol import Engine
from ..engines.replicas import ReplicaEngine
from ..engines.state import named_tensors
from ..engines.step_queue import StepQueue
from ..engines.training_state import Copies, pieces_of
from ..job.errors import Unsupported
from ..job.schema import Job
from ..job.variants import Choice
from ..launch.played import played
from ..measure.clock import WARMUP_STEPS
from ..measure.memory import StorageMeter
from ..measure.traffic import CollectiveCounter
from ..measure.valueless import forget_buffers, forget_values, valueless, values
from ..models import build_model, made_whole, without_weights
from ..records.dry_run import Collective, DryRun, Shard
from ..strategies import registry

Sets = tuple[Sequence[Any], Sequence[Any]]


class _AlikeQueue(StepQueue):
    """Sends a step's numbers as ever; what comes back is that each rank says what this one does."""

    def __init__(self, job: Job, device: torch.device, world: int) -> None:
        super().__init__(device, job.log.every, job.checkpoint.every is not None)
        self.world, self.number = world, 0.0
        self.readable = False  # they have no values

    def send(self, number: int | float | None = None) -> None:
        self.number = self.number if number is None else number
        super().send(number)

    def sent(self) -> list[float]:
        return [self.number] * self.world


def play(choice: Choice, data: Sets, result: DryRun) -> DryRun:
    """Return the result with what one rank holds and sends, read off its live engine.

    Raises what the engine or the job's own code does, Unsupported where it reads what other ranks
    compute, and an error of `hybrid.measure.valueless.Unread` where it reads a value."""
    job, world = made_whole(without_weights(choice.job)), result.world
    meter, counter = StorageMeter("meta"), CollectiveCounter()
    with contextlib.ExitStack() as opened:
        placement = opened.enter_context(played(result.rank, world))
        mode = opened.enter_context(valueless())
        opened.callback(counter.close)
        with meter:
            layers, loss = build_model(job)
            forget_buffers(module for layer in layers for module in layer.modules())
            names = {name: p.numel() for p, name in layers.names().items()}
            known = targets_per_sample(data[0], loss)
            engine = registry.open_engine(job, choice.strategy, layers, loss, placement, data[0])
        del layers
        _make_alike(engine, job, world)
        steps = _Steps(job, choice.strategy, engine, data[0], known)
        # The others send the buffers that a step has changed, replicas send all.
        mode.keeps_real = not isinstance(engine, ReplicaEngine)
        _step(engine, steps, meter, counter)
        with values():
            pieces = _pieces(engine)
        here = sum(p.tensor.numel() for p in pieces if p.key == WEIGHT and p.name in names)
        engine.close()
    return dataclasses.replace(
        result,
        parameters_total=sum(names.values()),
        parameters_here=here,
        collectives=_collectives(counter),
        memory_bytes=meter.peak_bytes_since_mark,
        shards=[_shard(piece) for piece in pieces],
        not_counted=counter.not_counted(),
    )


def _make_alike(engine: Engine, job: Job, world: int) -> None:
    """Answer for the other ranks, where an engine asks them for the sizes of their batches."""
    if not isinstance(engine, BaseEngine):
        return
    if engine.counter.needs_output:
        raise Unsupported(
            "the loss tells how many targets it counts only with an output, which has no values in "
            "a dry-run; give it an attribute count(target)"
        )
    engine.queue = _AlikeQueue(job, engine.device, world)


class _Steps:
    """Loads this rank's own batches, whose floating-point numbers lose their values."""

    def __init__(
        self, job: Job, strategy: str, engine: Engine, samples: Sequence[Any], known: int | None
    ) -> None:
        sizes = job.train.global_batch, engine.layout.dp, job.micro_batches(strategy)
        self.plan = BatchPlan(len(samples), *sizes, job.train.seed)
        reads = engine.reads_inputs, engine.reads_targets
        rows = engine.micro_batch_size
        self.loader = StepLoader(self.plan, samples, engine.shares, rows, *reads, known)
        self.known, self.period = known, registry.steps_between_syncs(job, strategy)

    def numbers(self) -> list[int]:
        """Return the steps that are made: local SGD merges its replicas in the last one."""
        return [*range(WARMUP_STEPS), max(WARMUP_STEPS, self.period - 1)]

    def load(self, step: int) -> tuple[list[MicroBatch], int | None, int]:
        """Return the micro-batches of a step, its targets over all ranks where known, its samples.

        The smaller last batch of an epoch is left out. Raises Unsupported where one is empty."""
        step %= max(1, self.plan.num_samples // self.plan.global_batch)
        with values():
            loaded = self.loader.step_alone(step)
        if not all(len(batch.ids) for batch in loaded):
            raise Unsupported("a micro-batch of this rank has no sample, and its loss is read then")
        return [_without_values(batch) for batch in loaded], *self.plan.totals(step, self.known)


def _without_values(batch: MicroBatch) -> MicroBatch:
    parts = forget_values((batch.input, batch.target))
    return dataclasses.replace(batch, input=parts[0], target=parts[1])


def _step(engine: Engine, steps: _Steps, meter: StorageMeter, counter: CollectiveCounter) -> None:
    """Make some steps; the last is counted, since the first ones set up what others have."""
    numbers = steps.numbers()
    meter.mark()
    for step in numbers:
        loaded = steps.load(step)
        engine.step = step
        counting = _counting(counter) if step == numbers[-1] else contextlib.nullcontext()
        with counting, meter:
            engine.start_step(*loaded)


@contextlib.contextmanager
def _counting(counter: CollectiveCounter) -> Iterator[None]:
    counter.start()
    yield
    counter.stop()


def _pieces(engine: Engine) -> list[Piece]:
    """Return what this rank holds, which for a replica is more than its share of a checkpoint."""
    if isinstance(engine, ReplicaEngine):
        return pieces_of(named_tensors(engine.model), engine.optimizers[0], Copies())
    return engine.pieces()


def _collectives(counter: CollectiveCounter) -> list[Collective]:
    return [
        Collective(op, size, count.calls, count.payload_bytes, count.sent_bytes)
        for (op, size), count in sorted(counter.by_group().items())
    ]


def _shard(piece: Piece) -> Shard:
    local = piece.tensor
    shapes: Mapping[str, list[int]] = {"shape": [*piece.shape], "local_shape": [*local.shape]}
    size = local.numel() * local.element_size()
    return Shard(piece.name, piece.key, start=piece.start, bytes=size, **shapes)
