"""This module shows DeepSpeed's fp32 partitions as pieces of a checkpoint, and takes them back.

DeepSpeed's optimizer steps flat tensors, each of which holds parts of many parameters: fp32 master
weights, and state in the same places. Under ZeRO-1 and 2, and in bf16 without them, a flat tensor
is cut into equal parts, wherever a parameter ends. Under ZeRO-3 each parameter is cut into equal
parts, the last of which is padded. Nothing is gathered here.

An optimizer's number, such as AdamW's `step`, stands once for a flat tensor. In a checkpoint each
parameter has its own."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..checkpoint.pieces import WEIGHT, Piece
from ..job.errors import JobError
from .deepspeed_setup import fp32_partitions
from .frozen import FrozenParts
from .protocol import Shapes
from .training_state import NUMBERS, Copies, make_piece

Tensors = Mapping[str, torch.Tensor]


class Fragment(NamedTuple):
    """Says where this rank's part of a trained parameter lies.

    It is `size` elements from `start` on in the parameter, and from `offset` on in a flat fp32
    tensor. `size` is 0 where the rank has none; the flat tensor is then that of the others."""

    flat: torch.Tensor
    offset: int
    start: int
    size: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor that is laid out as the flat one is, not copied."""
        return tensor.detach().narrow(0, self.offset, self.size)


def fragments_of(optimizer: Any) -> dict[Any, Fragment]:
    """Return this rank's part of each parameter that one of DeepSpeed's optimizers steps."""
    flats = fp32_partitions(optimizer)
    if hasattr(optimizer, "fp16_groups"):  # ZeRO-3
        cuts = map(_cut_alone, optimizer.fp16_groups, flats)
    elif hasattr(optimizer, "bf16_groups"):  # ZeRO-1 in bf16
        groups, wholes = optimizer.bf16_groups, optimizer.bf16_groups_flat
        cuts = map(_cut_together, groups, wholes, flats, optimizer.real_dp_process_group)
    else:
        groups, wholes = optimizer.bit16_groups, optimizer.bit16_groups_flat
        cuts = map(_cut_together, groups, wholes, flats, optimizer.real_dp_process_group)
    return dict(itertools.chain.from_iterable(cuts))


def _cut_together(
    group: Sequence[Any], whole: torch.Tensor, flat: torch.Tensor, ranks: Any
) -> Iterator[tuple[Any, Fragment]]:
    """Yield this rank's parts of parameters that are views of `whole`, of which it has `flat`.

    Where they lie is read off the tensors: DeepSpeed's own links were wrong (`link_reordered`)."""
    first = flat.numel() * dist.get_rank(ranks)
    for parameter in group:
        place = parameter.storage_offset() - whole.storage_offset()
        begin = max(place, first)
        count = min(place + parameter.numel(), first + flat.numel()) - begin
        found = Fragment(flat, begin - first, begin - place, count)
        yield parameter, found if count > 0 else Fragment(flat, 0, 0, 0)


def _cut_alone(group: Sequence[Any], flat: torch.Tensor) -> Iterator[tuple[Any, Fragment]]:
    """Yield this rank's parts of parameters that ZeRO-3 cuts one by one, without the padding."""
    offset = 0
    for parameter in group:
        size = parameter.partition_numel()
        start = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        yield parameter, Fragment(flat, offset, start, min(size, parameter.ds_numel - start))
        offset += size


def pieces_of_partitions(
    tensors: Tensors, optimizer: Any, copies: Copies, frozen: FrozenParts
) -> list[Piece]:
    """Return this rank's parts of a model's tensors (by canonical name) and of their state.

    Every rank returns a piece of each tensor, empty where it has nothing of it.

    optimizer: DeepSpeed's. copies: of what is not cut. frozen: the parameters that it rounded."""
    fragments, found = fragments_of(optimizer), list[Piece]()
    states: dict[torch.Tensor, _FlatState] = {}
    for weight in weights_of_partitions(tensors, fragments, copies, frozen):
        found.append(weight)
        fragment = fragments.get(tensors[weight.name])
        if fragment is not None and tensors[weight.name] not in frozen.parts:
            flat = fragment.flat
            if flat not in states:
                states[flat] = _FlatState(optimizer.optimizer, flat)
            found += states[flat].pieces(weight.name, weight.shape, fragment, copies)
    return found


def weights_of_partitions(
    tensors: Tensors, fragments: Mapping[Any, Fragment], copies: Copies, frozen: FrozenParts
) -> list[Piece]:
    """Return this rank's parts of a model's tensors alone; fragments: of `fragments_of`."""
    found = []
    for name, tensor in tensors.items():
        fragment = fragments.get(tensor)
        if tensor in frozen.parts:
            found.append(frozen.piece(name, tensor))
        elif fragment is None:
            found.append(_untrained(name, tensor, copies))
        else:
            part = fragment.of(fragment.flat)
            found.append(Piece(name, WEIGHT, shape_of(tensor), part, fragment.start))
    return found


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a whole parameter, which a rank may hold a part of alone."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _untrained(name: str, tensor: Any, copies: Copies) -> Piece:
    """Return what this rank holds of a buffer, or of a parameter that is not trained."""
    if not hasattr(tensor, "ds_id"):
        return make_piece(name, WEIGHT, tensor, copies)
    part = tensor.ds_tensor.detach().view(-1)
    start = min(part.numel() * dist.get_rank(tensor.ds_process_group), tensor.ds_numel)
    count = min(part.numel(), tensor.ds_numel - start)
    return Piece(name, WEIGHT, shape_of(tensor), part[:count], start)


class _FlatState:
    """Is what an optimizer keeps of one flat tensor.

    `taken` has the values that a checkpoint gave for all parameters of it, each with the first
    parameter that had it."""

    def __init__(self, optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> None:
        self.values: dict[str, Any] = optimizer.state.get(flat, {})
        self.flat, self.counts = flat, _counts_in_integers(optimizer)
        self.taken: dict[str, tuple[str, torch.Tensor]] = {}

    def pieces(
        self, name: str, shape: tuple[int, ...], fragment: Fragment, copies: Copies
    ) -> Iterator[Piece]:
        """Yield the pieces of one parameter's state; copies: of what stands for them all."""
        for key, value in self.values.items():
            if isinstance(value, torch.Tensor) and value.shape == self.flat.shape:
                yield Piece(name, key, shape, fragment.of(value), fragment.start)
            elif isinstance(value, torch.Tensor):
                yield SharedPiece(name, key, tuple(value.shape), value, 0, copies, self)
            elif type(value) in NUMBERS:
                is_step = self.counts and key == "step"
                dtype = torch.float32 if is_step else NUMBERS[type(value)]
                number = torch.tensor(value, dtype=dtype)
                yield SharedPiece(name, key, (), number, 0, copies, self)
            elif value is not None:
                raise JobError(
                    f"optimizer.name: it keeps a {type(value).__name__}, {key!r}, of {name}; valid "
                    "in a checkpoint: tensors and numbers"
                )


@dataclasses.dataclass(frozen=True)
class SharedPiece(Piece):
    """Is what an optimizer keeps once of a flat tensor: in a checkpoint each parameter has it."""

    state: Any = None  # a `_FlatState`

    def write(self, first: int, values: torch.Tensor) -> None:
        """Take the value over; raises JobError where two parameters of the tensor differ in it."""
        other, taken = self.state.taken.setdefault(self.key, (self.name, values.clone()))
        if not torch.equal(taken, values):
            raise JobError(
                f"the checkpoint has {self.key} = {values.tolist()[0]:g} of {self.name} and "
                f"{taken.tolist()[0]:g} of {other}; DeepSpeed keeps one for both"
            )
        live = self.state.values[self.key]
        if isinstance(live, torch.Tensor):
            super().write(first, values)
        else:
            self.state.values[self.key] = type(live)(values.item())


@torch.no_grad()
def make_room_in_partitions(
    tensors: Tensors, optimizer: Any, shapes: Shapes, numbers: Collection[str]
) -> None:
    """Make the state that DeepSpeed's optimizer has not made yet, zeros, for what a checkpoint has.

    numbers: the keys under which the optimizer keeps numbers, not tensors."""
    inner, fragments = optimizer.optimizer, fragments_of(optimizer)
    found: dict[tuple[torch.Tensor, str], list[_Kept]] = {}
    for name, tensor in tensors.items():
        if tensor in fragments:
            flat = fragments[tensor].flat
            for key, (dtype, shape) in shapes.get(name, {}).items():
                kept = _Kept(dtype, shape, shape == shape_of(tensor))
                found.setdefault((flat, key), []).append(kept)
    for (flat, key), of_all in found.items():
        state: Any = inner.state[flat]
        if key != WEIGHT and state.get(key) is None:
            state[key] = _zeros(inner, flat, key, of_all, numbers)


class _Kept(NamedTuple):
    """Describes what a checkpoint has under one key of a parameter; is_cut: as the parameter is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_cut: bool


def _zeros(
    optimizer: torch.optim.Optimizer,
    flat: torch.Tensor,
    key: str,
    of_all: Sequence[_Kept],
    numbers: Collection[str],
) -> Any:
    dtype, shape, _ = of_all[0]
    if key == "step" and _counts_in_integers(optimizer):
        return 0
    if key in numbers:
        return torch.zeros((), dtype=dtype).item()
    if all(kept.is_cut for kept in of_all):
        return torch.zeros_like(flat, dtype=dtype)
    device = flat.device if key != "step" or _on_device(optimizer) else "cpu"
    return torch.zeros(shape, dtype=dtype, device=device)


def _counts_in_integers(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether this is DeepSpeed's AdamW for offloading, which keeps `step` as an integer."""
    return type(optimizer).__name__ == "DeepSpeedCPUAdam"


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer of torch's keeps step counts where the parameters are."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def numbers_in_partitions(optimizer: Any) -> list[str]:
    """Return the keys under which the optimizer keeps a number of a parameter, not a tensor."""
    inner = optimizer.optimizer
    found = {k for state in inner.state.values() for k, v in state.items() if type(v) in NUMBERS}
    return sorted(found - {"step"} if _counts_in_integers(inner) else found)


@torch.no_grad()
def update_parameters(optimizer: Any) -> None:
    """Give all ranks' parameters the values of the fp32 master weights; collective.

    It does what DeepSpeed does after a step."""
    _repeat_counts(optimizer.optimizer)
    if not hasattr(optimizer, "fp16_groups"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for i in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
    optimizer._post_step(set())


def _repeat_counts(optimizer: Any) -> None:
    """Bring the powers of beta to where they were in DeepSpeed's AdamW for offloading.

    It multiplies one rounded power by beta in each step, but takes the power at once where a step
    does not follow the last (`IncrementStep` in csrc/includes/cpu_adam.h, 0.19.8), and rounds
    otherwise. So the steps are repeated, on no elements."""
    if not _counts_in_integers(optimizer):
        return
    group, none = optimizer.param_groups[0], torch.empty(0)
    steps = max((state.get("step", 0) for state in optimizer.state.values()), default=0)
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, *[none] * 4
        )
