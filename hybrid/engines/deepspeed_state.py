"""This module shows DeepSpeed's fp32 partitions as pieces of a checkpoint, and takes them back.

DeepSpeed's optimizer steps flat tensors, each of which holds parts of many parameters: fp32 master
weights, and state in the same places. Under ZeRO-1 and 2, and in bf16 without them, a flat tensor
is cut into equal parts, wherever a parameter ends. Under ZeRO-3 each parameter is cut into equal
parts, the last of which is padded. Nothing is gathered here.

An optimizer's number, such as AdamW's `step`, stands once for a flat tensor. In a checkpoint each
parameter has its own."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..checkpoint.pieces import WEIGHT, Piece
from ..job.errors import JobError
from .deepspeed_setup import fp32_partitions
from .protocol import Shapes
from .training_state import NUMBERS, Copies, make_piece

Tensors = Mapping[str, torch.Tensor]


class Fragment(NamedTuple):
    """Is this rank's part of a trained parameter: `count` elements from `start` on in it, which are
    those from `offset` on in a flat fp32 tensor. A rank may have none, and the tensor all the same:
    then `count` is 0."""

    flat: torch.Tensor
    offset: int
    start: int
    count: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor that is laid out as the flat one is, not copied."""
        return tensor.detach().narrow(0, self.offset, self.count)


def fragments_of(optimizer: Any) -> dict[Any, Fragment]:
    """Return this rank's part of each parameter that one of DeepSpeed's optimizers steps."""
    flats = fp32_partitions(optimizer)
    if hasattr(optimizer, "fp16_groups"):  # ZeRO-3
        groups = zip(optimizer.fp16_groups, flats, strict=True)
        return {p: f for group, flat in groups for p, f in _cut_alone(optimizer, group, flat)}
    groups = getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups
    return {p: _linked(p, flat) for group, flat in zip(groups, flats, strict=True) for p in group}


def _linked(parameter: Any, flat: torch.Tensor) -> Fragment:
    """Return the part that DeepSpeed has linked to a parameter; it links none to an empty one."""
    link = parameter._hp_mapping
    if link is None:
        return Fragment(flat, 0, 0, 0)
    here, there = link.hp_fragment_address, link.lp_fragment_address
    return Fragment(flat, here.start, there.start, here.numel)


def _cut_alone(optimizer: Any, group: Any, flat: torch.Tensor) -> Iterator[tuple[Any, Fragment]]:
    """Yield ZeRO-3's parts of some parameters, without the padding of the last one."""
    offset = 0
    for parameter in group:
        size = parameter.partition_numel()
        start = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
        yield parameter, Fragment(flat, offset, start, min(size, parameter.ds_numel - start))
        offset += size


def pieces_of_partitions(tensors: Tensors, optimizer: Any, copies: Copies) -> list[Piece]:
    """Return this rank's parts of a model's tensors (by canonical name) and of their state.

    Every rank returns a piece of each tensor, empty where it has nothing of it.

    optimizer: DeepSpeed's. copies: of what is not cut."""
    fragments, found = fragments_of(optimizer), list[Piece]()
    states: dict[torch.Tensor, _FlatState] = {}
    for name, tensor in tensors.items():
        fragment = fragments.get(tensor)
        if fragment is None:
            found.append(_untrained(name, tensor, copies))
            continue
        flat = fragment.flat
        if flat not in states:
            states[flat] = _FlatState(optimizer.optimizer, flat)
        shape = shape_of(tensor)
        found.append(Piece(name, WEIGHT, shape, fragment.of(flat), fragment.start))
        found += states[flat].pieces(name, shape, fragment, copies)
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
    for name, tensor in tensors.items():
        if tensor not in fragments:
            continue
        flat = fragments[tensor].flat
        state: Any = inner.state[flat]
        for key, (dtype, shape) in shapes.get(name, {}).items():
            if key == WEIGHT or state.get(key) is not None:
                continue
            if key == "step" and _counts_in_integers(inner):
                state[key] = 0
            elif key in numbers:
                state[key] = torch.zeros((), dtype=dtype).item()
            elif shape == shape_of(tensor):
                state[key] = torch.zeros_like(flat, dtype=dtype, requires_grad=False)
            else:
                device = flat.device if key != "step" or _on_device(inner) else "cpu"
                state[key] = torch.zeros(shape, dtype=dtype, device=device)


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
    if not hasattr(optimizer, "fp16_groups"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for i in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
    optimizer._post_step(set())


def read_loss_scale(scaler: Any) -> dict[str, float]:
    """Return the scale of one of DeepSpeed's loss scalers, and how many good steps it has had.

    DeepSpeed counts from the step before which the last overflow was, or the run's first."""
    since = scaler.cur_iter - scaler.last_overflow_iter - 1
    good = since % scaler.scale_window if since <= scaler.scale_window else 0
    return {"scale": float(scaler.cur_scale), "good_steps": good}


def set_loss_scale(scaler: Any, state: Mapping[str, float]) -> None:
    """Take over what `read_loss_scale`, or torch's scaler under another strategy, returned."""
    scaler.cur_scale = float(state["scale"])
    scaler.cur_iter, scaler.last_overflow_iter = int(state["good_steps"]), -1
