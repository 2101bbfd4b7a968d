"""This module shows a live model and its optimizer as pieces of a checkpoint, and takes them back.

It is for plain torch: one process, DDP, FSDP2. What an optimizer keeps of a parameter must be
tensors or numbers; a number is a tensor without dimensions in a checkpoint."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, zeros
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..checkpoint.pieces import WEIGHT, Piece
from ..job.errors import JobError
from ..job.schema import Job
from .optimizer_numbers import NUMBERS
from .own_optimizer import is_own
from .protocol import Shapes


class Copies(NamedTuple):
    """Tells which of how many ranks this is, among those that hold a whole tensor."""

    mine: int = 0
    ranks: int = 1


def pieces_of(
    tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, copies: Copies
) -> list[Piece]:
    """Return this rank's parts of a model's tensors (by canonical name) and of their state.

    copies: of what is not sharded."""
    found = []
    for name, tensor in tensors.items():
        found += weights_of({name: tensor}, copies)
        state: Any = optimizer.state.get(tensor, {})
        for key in state:
            _require_cut_alike(name, key, state[key], tensor)
        kept = (make_piece_of_state(name, key, state, copies) for key in state)
        found += [piece for piece in kept if piece is not None]
    return found


def weights_of(tensors: Mapping[str, torch.Tensor], copies: Copies) -> list[Piece]:
    """Return this rank's parts of a model's tensors alone."""
    return [make_piece(name, WEIGHT, tensor, copies) for name, tensor in tensors.items()]


def _require_cut_alike(name: str, key: str, value: Any, parameter: torch.Tensor) -> None:
    """Raise JobError where a state's tensor is not cut in a way that can be put together again."""
    if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor)):
        return
    given, whole, local = f"optimizer.name: its {key!r} of {name}", parameter.shape, value.shape
    if not isinstance(value, DTensor):
        if local == parameter.to_local().shape != whole:
            raise JobError(
                f"{given} is a plain tensor of this rank's rows alone; valid in a checkpoint: a "
                "DTensor, as torch.zeros_like(parameter) gives one"
            )
    elif value.placements != parameter.placements or value.shape[:1] != whole[:1]:
        raise JobError(
            f"{given} is a DTensor {list(value.shape)} placed as {value.placements}; valid in a "
            f"checkpoint: rows placed as the parameter's, {parameter.placements}"
        )


@dataclasses.dataclass(frozen=True)
class NumberPiece(Piece):
    """Is a number that an optimizer keeps of a parameter: a tensor in the checkpoint alone."""

    state: Any = None

    def write(self, first: int, values: torch.Tensor) -> None:
        self.state[self.key] = values.item()


def make_piece_of_state(name: str, key: str, state: Any, copies: Copies) -> Piece | None:
    """Return what an optimizer keeps under a key of a parameter; None: it keeps nothing there.

    Raises JobError where that is neither a tensor nor a number."""
    value = state[key]
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return make_piece(name, key, value, copies)
    if isinstance(value, (bool, int, float)):
        number = torch.tensor(value, dtype=NUMBERS[type(value)])
        return NumberPiece(name, key, (), number, 0, copies, state)
    raise JobError(
        f"optimizer.name: it keeps a {type(value).__name__}, {key!r}, of {name}; valid in a "
        "checkpoint: tensors and numbers"
    )


def make_piece(name: str, key: str, tensor: Any, copies: Copies) -> Piece:
    """Return what this rank holds of a tensor, which FSDP2 may have cut along its first axis."""
    if not isinstance(tensor, DTensor):
        return Piece(name, key, tuple(tensor.shape), tensor, 0, copies)
    mesh, placements = tensor.device_mesh, tensor.placements
    shape = tuple(tensor.shape)
    _, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    width = 1
    for size in shape[1:]:
        width *= size
    mine, ranks = 0, 1  # of the ranks that hold this shard too
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            mine = mine * mesh.size(axis) + mesh.get_local_rank(axis)
            ranks *= mesh.size(axis)
    return Piece(name, key, shape, tensor.to_local(), offset[0] * width, (mine, ranks))


@torch.no_grad()
def make_room(
    tensors: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    shapes: Shapes,
    numbers: Collection[str] = (),
) -> None:
    """Make the state that an optimizer has not made yet, zeros, for what a checkpoint has.

    No step is made for that. A state in its parameter's shape is sharded as the parameter is.
    numbers: the keys under which the optimizer keeps numbers, not tensors."""
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, tensor in tensors.items():
        if tensor not in trained:
            continue
        state: Any = optimizer.state[tensor]
        for key, (dtype, shape) in shapes.get(name, {}).items():
            if key == WEIGHT or state.get(key) is not None:
                continue
            if key in numbers:
                state[key] = torch.zeros((), dtype=dtype).item()
            elif shape == tensor.shape and shape:
                state[key] = torch.zeros_like(tensor, dtype=dtype)
            elif isinstance(tensor, DTensor) and shape[:1] == tensor.shape[:1]:
                state[key] = zeros(  # such as a mean of each row
                    shape, dtype=dtype, device_mesh=tensor.device_mesh, placements=tensor.placements
                )
            else:
                state[key] = torch.zeros(shape, dtype=dtype, device=_device(optimizer, tensor, key))


def as_stepper(job: Job, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
    """Return an optimizer of torch's, which changes its state in `step` alone; None: another one.

    DeepSpeed's own may do as it likes, and so may that of a user's function: it may have hooks."""
    known = type(optimizer) in (torch.optim.AdamW, torch.optim.SGD)
    return optimizer if known and not is_own(job) else None


def numbers_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the keys under which an optimizer keeps a number of a parameter, not a tensor."""
    states = list(optimizer.state.values())
    return sorted({k for state in states for k, v in state.items() if type(v) in NUMBERS})


def _device(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, key: str) -> torch.device:
    """Return where an optimizer keeps a small tensor.

    Those of torch keep step counts on the host, unless they are fused (torch/optim/optimizer.py).
    """
    for group in optimizer.param_groups:
        if any(p is tensor for p in group["params"]):
            on_device = key != "step" or group.get("fused") or group.get("capturable")
            return tensor.device if on_device else torch.device("cpu")
    return tensor.device
