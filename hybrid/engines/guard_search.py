"""This module finds what a step went wrong by: rank, sample, and the first layer.

The step is made again on all ranks, from the weights and buffers it began with and with the same
random numbers, while hooks look at what each module returns and at the gradients of that. It ends
before its update. It costs as much as a step, and is made only where the run then ends."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..data.loader import MicroBatch, was_changed
from ..job.errors import RunError
from ..launch.exchange import gather_objects
from ..launch.serialization import sendable
from ..models.losses import take_loss
from ..models.own_loss import OwnLoss
from .counting import num_rows
from .guard import Guard, Searched
from .state import on_device

SHOWN = 5  # samples that are named, where several are to blame
WRAPPERS = ("DistributedDataParallel", "DeepSpeedEngine")  # each holds the model as `module`


def guarded_step(
    engine: Any,
    guard: Guard,
    micro_batches: Sequence[MicroBatch],
    step: Callable[[Sequence[MicroBatch]], None],
) -> None:
    """Make a step of an engine by `step(micro_batches)`; it ends the run where its guard says so.

    Raises RunError on every rank then, with what is wrong and where."""
    models = models_of(engine)
    guard.begin(models)
    given = micro_batches
    if guard.changes_batches is not False:  # the search needs them as they were
        given = [micro_batch.copied() for micro_batch in micro_batches]
    step(given)
    if guard.changes_batches is None:
        guard.changes_batches = was_changed([(part.input, part.target) for part in given])
    if guard.fault is None or guard.policy != "stop":
        return
    search, guard.searching = _Search(engine, models, micro_batches), True
    try:
        step(micro_batches)
    except Searched:
        pass
    finally:
        guard.searching = False
        search.close()
    raise RunError(f"step {engine.step}: {guard.fault}; {search.describe(guard.spikes)}")


def models_of(engine: Any) -> list[Any]:
    """Return the live models of an engine, one for each replica in this process."""
    return list(getattr(engine, "models", [engine.model]))


@sendable
@dataclasses.dataclass
class _Seen:
    """Holds what one rank saw, by the numbers of its micro-batches: a layer, ids of samples."""

    column: int
    stage: int
    inputs: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    layers: dict[int, tuple[str, list[int]]] = dataclasses.field(default_factory=dict)
    losses: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    gradient: tuple[int, str, list[int]] | None = None
    highest: tuple[float, int] | None = None  # the greatest loss of a sample, and its id


class _Search:
    """Hooks an engine's modules, and notes what first went wrong in its micro-batches."""

    def __init__(
        self, engine: Any, models: Sequence[Any], micro_batches: Sequence[MicroBatch]
    ) -> None:
        self.engine, self.micro_batches = engine, micro_batches
        self.number = -1  # of the micro-batch that is in its forward pass
        self.seen = _Seen(engine.shares[0], engine.placement.stage)
        self._handles: list[Any] = []
        staged = engine.layout.pp > 1
        for model in models:
            root = model.module if type(model).__name__ in WRAPPERS else model
            self._handles.append(root.register_forward_pre_hook(self._begin))
            for name, module in root.named_modules():
                if staged:  # the stage's number is in front
                    name = name.partition(".")[2]
                # What is compiled calls no hooks of what is in it.
                module._compiled_call_impl = None
                self._handles.append(module.register_forward_hook(partial(self._leave, name)))
            for name, parameter in root.named_parameters():
                sharded = hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)
                if parameter.requires_grad and not sharded:
                    self._watch(parameter, f"the parameter {name}")
            self._handles.append(root.register_forward_hook(self._take_losses))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    @property
    def _ids(self) -> list[int]:
        ids: list[int] = self.micro_batches[self.number].ids.tolist()
        return ids

    def _begin(self, module: nn.Module, args: Any) -> None:
        self.number += 1
        micro_batch = self.micro_batches[self.number]
        bad = self._samples((micro_batch.input, micro_batch.target))
        if bad:
            self.seen.inputs[self.number] = bad

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = [t for t in tree_leaves(output) if _is_floating(t)]
        if self.number not in self.seen.layers and any(map(_is_bad, tensors)):
            self.seen.layers[self.number] = name, self._samples(tensors)
        for tensor in tensors:
            if tensor.requires_grad:
                self._watch(tensor, name)

    def _watch(self, tensor: torch.Tensor, name: str) -> None:
        """Look at the gradient of a tensor, once there is one."""
        began = self.number

        def look(gradient: torch.Tensor) -> None:
            if self.seen.gradient is None and not bool(gradient.isfinite().all()):
                samples = self._samples(gradient, began) if began >= 0 else []
                self.seen.gradient = max(began, self.number), name, samples

        self._handles.append(tensor.register_hook(look))

    def _samples(self, value: Any, number: int | None = None) -> list[int]:
        """Return the ids of the samples in whose rows tensors are not finite; none where unknown.

        A tensor may have several rows for each sample, one after another."""
        micro_batch = self.micro_batches[self.number if number is None else number]
        ids, rows = micro_batch.ids.tolist(), self._num_rows(micro_batch)
        found = set[int]()
        for tensor in filter(_is_floating, tree_leaves(value)):
            if tensor.dim() and tensor.numel() and tensor.shape[0] % rows == 0:
                bad = ~tensor.detach().isfinite().reshape(rows, -1).all(1)
                found |= {ids[i] for i in torch.nonzero(bad).flatten().tolist() if i < len(ids)}
        return sorted(found)

    def _num_rows(self, micro_batch: MicroBatch) -> int:
        if self.engine.micro_batch_size:
            return int(self.engine.micro_batch_size)
        given = micro_batch.input if micro_batch.target is None else micro_batch.target
        return num_rows(given)

    @torch.no_grad()
    def _take_losses(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take the loss of each sample alone, where this rank takes losses."""
        if not self.engine.reads_targets or isinstance(self.engine.loss, OwnLoss):
            return
        target = on_device(self.micro_batches[self.number], self.engine.device).target
        bad = []
        for i, sample in enumerate(self._ids):
            one = partial(_take_row, i)
            try:
                parts = tree_map_only(torch.Tensor, one, (output, target))
                total, count = take_loss(self.engine.loss, *parts)
            except Exception:  # a loss of the user's own may take no single sample
                return
            value = float(total) / (float(count) or 1.0)
            if total.isfinite():
                self.seen.highest = max((value, sample), self.seen.highest or (value, sample))
            else:
                bad.append(sample)
        if bad:
            self.seen.losses[self.number] = bad

    def describe(self, spikes: bool) -> str:
        """Say where the fault is, from what all ranks saw; collective."""
        ranks: list[_Seen] = gather_objects(self.seen)
        if spikes:
            return _describe_highest(ranks)
        found = [
            (number, seen.stage, rank, *what)
            for rank, seen in enumerate(ranks)
            for number, what in seen.layers.items()
        ]
        if found:
            number, _, rank, layer, samples = min(found, key=lambda one: one[:3])
            samples = _narrowed(ranks, rank, number, samples)
            text = f"{_where(rank, samples)}, {_layer(layer)}: its output is not finite"
            return text + _given(ranks, rank, number, samples)
        return _describe_loss(ranks) or _describe_gradient(ranks)


def _take_row(i: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[i : i + 1] if tensor.dim() else tensor


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_bad(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has NaN, or infinity where gradients flow: a mask may hold that."""
    if tensor.requires_grad or tensor.grad_fn is not None:
        return not bool(tensor.detach().isfinite().all())
    return bool(tensor.detach().isnan().any())


def _column(ranks: Sequence[_Seen], rank: int) -> list[_Seen]:
    """Return what the stages saw that have the same micro-batches as a rank."""
    return [seen for seen in ranks if seen.column == ranks[rank].column]


def _narrowed(ranks: Sequence[_Seen], rank: int, number: int, samples: list[int]) -> list[int]:
    """Return the fewest samples to blame: by the layer's rows, their own losses, their inputs.

    Each of these may show too many, such as where a layer mixes its rows."""
    left = set(samples)
    for kind in ("losses", "inputs"):
        for seen in _column(ranks, rank):
            found = set(getattr(seen, kind).get(number, []))
            left = (left & found) or left or found
    return sorted(left)


def _given(ranks: Sequence[_Seen], rank: int, number: int, samples: list[int]) -> str:
    """Say whether what the data set gives of these samples is not finite."""
    bad = {i for seen in _column(ranks, rank) for i in seen.inputs.get(number, [])}
    return "; nor is the sample itself" if samples and bad >= set(samples) else ""


def _describe_loss(ranks: Sequence[_Seen]) -> str:
    """Say which samples have a loss that is not finite, of outputs that are."""
    found = [(n, rank, bad) for rank, seen in enumerate(ranks) for n, bad in seen.losses.items()]
    if not found:
        return ""
    number, rank, samples = min(found)
    samples = _narrowed(ranks, rank, number, samples)
    text = f"{_where(rank, samples)}, the loss: every layer's output is finite"
    return text + _given(ranks, rank, number, samples)


def _describe_gradient(ranks: Sequence[_Seen]) -> str:
    """Say whose gradient is the first that is not finite in the backward pass."""
    found = [
        (seen.gradient[0], -seen.stage, rank, *seen.gradient[1:])
        for rank, seen in enumerate(ranks)
        if seen.gradient
    ]
    if not found:
        return "the output and the gradient of each layer are finite: their sums overflow"
    _, _, rank, layer, samples = min(found)
    return f"{_where(rank, samples)}, {_layer(layer)}: the gradient of its output is not finite"


def _describe_highest(ranks: Sequence[_Seen]) -> str:
    """Say which sample has the greatest loss."""
    found = [(*seen.highest, rank) for rank, seen in enumerate(ranks) if seen.highest]
    if not found:
        return "the loss of single samples is not known"
    loss, sample, rank = max(found)
    return f"{_where(rank, [sample])} has the greatest loss, {loss:.6g}"


def _where(rank: int, samples: Sequence[int]) -> str:
    if not samples:
        return f"rank {rank}"
    shown = ", ".join(map(str, samples[:SHOWN]))
    more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
    return f"rank {rank}, sample{'s' if len(samples) > 1 else ''} {shown}{more} of the train set"


def _layer(name: str) -> str:
    return name if name.startswith("the ") else f"layer {name}" if name else "the model"
