"""This module replaces replicas of a model by their weighted mean (local SGD)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from .optimizer import length

LEAST = 2**18  # elements that are merged at once, at least: a MiB in fp32
ALIGNED = 16  # bytes: some kernels first copy a tensor that begins elsewhere


class Replica:
    """Holds what a merge averages of one model, in one piece of memory for each dtype.

    Parameters lie there for good, so that a merge copies none of them. What cannot lie there is
    copied in and out: buffers, which a model may replace at any time, and parameters whose memory
    is another tensor's too, or is not contiguous."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.is_floating_point()]
        self._modules = list(model.modules())
        alone = _alone([*model.parameters(), *model.buffers()])
        self._moves = [p.data_ptr() in alone for p in self._parameters]
        self._elsewhere: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lay_out(self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        """Return the parameters, then the buffers that the model has now."""
        found: dict[int, torch.Tensor] = {id(p): p.data for p in self._parameters}
        for module in self._modules:
            for buffer in module._buffers.values():
                if buffer is not None and buffer.is_floating_point():
                    found.setdefault(id(buffer), buffer)
        return list(found.values())

    @torch.no_grad()
    def _lay_out(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make a place for each tensor, and move the parameters that can lie there.

        Tensors whose sizes keep the next one aligned come first, so that nothing is left free."""
        sizes: dict[torch.dtype, int] = defaultdict(int)
        starts = [0] * len(tensors)
        for i in sorted(range(len(tensors)), key=lambda i: tensors[i].nbytes % ALIGNED > 0):
            starts[i] = sizes[tensors[i].dtype]
            sizes[tensors[i].dtype] += tensors[i].numel()
        self.flats = {t: tensors[0].new_zeros(size, dtype=t) for t, size in sizes.items()}
        self._places = []
        for tensor, start in zip(tensors, starts, strict=True):
            place = self.flats[tensor.dtype][start : start + tensor.numel()].view(tensor.shape)
            self._places.append(place)
        count = len(self._parameters)
        for parameter, moves, place in zip(
            self._parameters, self._moves, self._places[:count], strict=True
        ):
            if moves:
                parameter.data = place.copy_(parameter)
        trained = sum(p.numel() for p in self._parameters if p.requires_grad)
        changing = trained + sum(t.numel() for t in tensors[count:])
        self.pieces = -(-sum(t.numel() for t in tensors) // max(LEAST, changing))

    def gather(self) -> list[torch.Tensor]:
        """Return the flat memory in pieces, with the values that the model has now.

        A piece has as many elements as change in a step, so that a copy of it has room where the
        gradients were; of a model that is trained whole there is one."""
        tensors = self._tensors()
        if [t.shape for t in tensors] != [place.shape for place in self._places]:
            self._lay_out(tensors)
            tensors = self._tensors()
        pairs = zip(tensors, self._places, strict=True)
        self._elsewhere = [(t, place) for t, place in pairs if t.data_ptr() != place.data_ptr()]
        for tensor, place in self._elsewhere:
            place.copy_(tensor)
        return [piece for flat in self.flats.values() for piece in flat.chunk(self.pieces)]

    def spread(self) -> None:
        """Give what lies elsewhere the values of the flat memory."""
        for tensor, place in self._elsewhere:
            tensor.copy_(place)


def _alone(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return the addresses of those tensors that alone fill their memory, in order."""
    tensors = list(tensors)
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)
    return {
        tensor.data_ptr()
        for tensor in tensors
        if tensor.is_contiguous()
        and owners[tensor.untyped_storage().data_ptr()] == 1
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    }


@torch.no_grad()
def merge(
    replicas: Sequence[Replica], weights: Sequence[float], finite: bool, drifts: bool
) -> torch.Tensor | None:
    """Replace the replicas of all ranks by their weighted mean; collective.

    replicas: this rank's. weights: of each of them; those of all ranks have the mean 1. finite: no
    buffer has infinities. Returns how far each replica here was from the mean, relative to the
    mean's norm, float64 [replicas], if it is asked for `drifts`; that takes a copy of a piece."""
    means: list[torch.Tensor] = []  # squares of norms, of each piece
    apart: list[list[torch.Tensor]] = [[] for _ in replicas]
    for first, *others in zip(*(replica.gather() for replica in replicas), strict=True):
        before = first.clone() if drifts else first
        _average(first, others, weights, finite)
        if drifts:
            means.append(_square(first, first, finite))
            for found, part in zip(apart, [before, *others], strict=True):
                found.append(_square(part.sub_(first), first, finite))
        for other in others:
            other.copy_(first)
    for replica in replicas:
        replica.spread()
    if not drifts:
        return None
    squares = torch.stack([torch.stack(found).sum() for found in apart])
    return (squares / torch.stack(means).sum()).sqrt()


def _average(
    first: torch.Tensor, others: Sequence[torch.Tensor], weights: Sequence[float], finite: bool
) -> None:
    """Make `first` the weighted mean over all replicas; collective. `others` are not changed."""
    _multiply(first, weights[0], finite)
    for other, weight in zip(others, weights[1:], strict=True):
        first += _multiply(other.clone(), weight, finite)
    replicas = 1 + len(others)
    if dist.is_initialized():
        replicas *= dist.get_world_size()
        if dist.get_world_size() > 1:
            dist.all_reduce(first)
    first.div_(replicas)


def _multiply(tensor: torch.Tensor, weight: float, finite: bool) -> torch.Tensor:
    """Multiply a tensor by its weight in place, and return it.
    0 times infinity stays infinite, and is not nan."""
    if weight == 1.0:  # as where all replicas saw as many samples: no pass over the memory
        return tensor
    if finite:
        return tensor.mul_(weight)
    return tensor.copy_(torch.where(tensor.isfinite(), tensor * weight, tensor))


def _square(tensor: torch.Tensor, mean: torch.Tensor, finite: bool) -> torch.Tensor:
    """Return the square of a tensor's norm, without what has no finite mean, float64 []."""
    return length(tensor if finite else torch.where(mean.isfinite(), tensor, 0.0)).square()
