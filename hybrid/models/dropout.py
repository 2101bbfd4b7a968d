"""This module makes dropout masks from seed, step, sample and place in the model alone.

torch's own dropout draws from one random stream per process, so that each layout of ranks and
micro-batches drops other units, and no two can be compared. Here each row of a batch has a stream
of its own, seeded by what the row is. So every strategy drops the same units, and activations that
are recomputed in backward meet the mask they had."""

import contextlib
import functools
import hashlib
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

Seeds = Sequence[int | None]
_rows: ContextVar[Seeds | None] = ContextVar("rows", default=None)


def num_real(seeds: Seeds) -> int:
    """Counts the rows that are samples; those after them are padding."""
    return len(seeds.ids) if isinstance(seeds, RowSeeds) else len(seeds) - list(seeds).count(None)


def mix(*numbers: int) -> int:
    """Mixes numbers to a seed of 63 bits, which depends on their order too."""
    digest = hashlib.blake2b(b"".join(n.to_bytes(16, "little", signed=True) for n in numbers))
    return int.from_bytes(digest.digest()[:8], "little") >> 1


class RowSeeds(Seeds):
    """Holds a seed for each row of a batch, along axis 0, and makes them when a dropout asks.

    ids: int64 [n], the samples of the first rows. rows: their number, with the padding after the
    n-th, which has None. key: what seeds depend on besides the sample: the job's seed, the step."""

    def __init__(self, ids: torch.Tensor, rows: int, *key: int) -> None:
        self.ids, self.rows, self.key = ids, rows, key

    @functools.cached_property
    def _made(self) -> list[int | None]:
        found: list[int | None] = [mix(*self.key, sample) for sample in self.ids.tolist()]
        return found + [None] * (self.rows - len(found))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]


class use_rows(contextlib.AbstractContextManager[None]):
    """Gives the rows of a batch, along axis 0, one seed each while the context lasts.

    A row with None is padding and stays as it is. Without any seeds, dropout draws from torch's own
    stream. It is no generator, since it stands around each forward pass: those take longer."""

    def __init__(self, seeds: Seeds | None) -> None:
        self._seeds = seeds

    def __enter__(self) -> None:
        self._token = _rows.set(self._seeds)

    def __exit__(self, *_: object) -> None:
        _rows.reset(self._token)


def set_rows(seeds: Seeds) -> None:
    """Gives seeds as `use_rows` does, but without an end."""
    _rows.set(seeds)


def rows_in_use() -> Seeds | None:
    """Returns the seeds in use."""
    return _rows.get()


def find_rows(
    x: torch.Tensor, rows: int, folded: bool = False, tokens_first: bool = False
) -> int | None:
    """Returns the axis along which a tensor has its rows, None where it has not so many.

    It is the first, which may have n lines for each row (its tokens or heads), and always where
    these are `folded` in. In a tensor of three axes or more it is the second where that has the
    rows' number and the first has not, or where `tokens_first` is known, as torch's transformers
    have it."""
    if not x.dim():
        return None
    second = x.dim() > 2 and x.shape[1] == rows and not folded
    if second and (tokens_first or x.shape[0] != rows):
        return 1
    return 0 if x.shape[0] % rows == 0 else None


class Dropout(nn.Dropout):
    """Draws as `nn.Dropout` does, but row by row under `use_rows`.

    `number_dropouts` sets `place`, which tells the dropouts of one model apart."""

    place = 0
    tokens_first = False  # known of torch's transformers, or seen in another batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [rows, ...], [rows * n, ...] with n lines a row, or [n, rows, ...] to that shape."""
        if not self.training or self.p == 0.0:
            return x
        seeds = _rows.get()
        axis = find_rows(x, len(seeds), tokens_first=self.tokens_first) if seeds else None
        if not seeds or axis is None:
            return super().forward(x)
        if axis == 1:
            self.tokens_first = True
        keep = 1.0 - self.p
        kept = draw_kept(x.shape, axis, x.device, seeds, keep, self.place)
        return x * (kept.div_(keep) if keep else kept).to(x.dtype)


@_disable_dynamo  # torch.compiler.disable imports the compiler at once, which takes a second
def draw_kept(
    shape: torch.Size,
    axis: int,
    device: torch.device,
    seeds: Seeds,
    keep: float,
    *place: int,
) -> torch.Tensor:
    """Draws fp32 numbers of this shape: 1 for what is kept, 0 for what is dropped.

    axis: of the rows, as `find_rows` gives it. A row that is padding has `keep` everywhere, which
    is 1 once the numbers are divided by it."""
    first = shape if axis == 0 else torch.Size((shape[1], shape[0], *shape[2:]))
    kept = torch.empty(first, device=device)  # fp32, so that all precisions draw alike
    for row, seed in zip(kept.chunk(len(seeds)), seeds, strict=True):
        if seed is None:
            row.fill_(keep)
        else:
            draw = torch.Generator(device).manual_seed(mix(seed, *place))
            row.bernoulli_(keep, generator=draw)
    return kept if axis == 0 else kept.transpose(0, 1)


def number_dropouts(modules: Sequence[nn.Module]) -> None:
    """Turns every `nn.Dropout` in a model into a `Dropout` with a place of its own.

    Call it on the whole model before that is cut, since places are counted through all of it."""
    found = [m for top in modules for m in top.modules() if isinstance(m, nn.Dropout)]
    for place, module in enumerate(dict.fromkeys(found)):
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
        if isinstance(module, Dropout):
            module.place = place
    for layer in (m for top in modules for m in top.modules()):
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            for own in layer.children():
                if isinstance(own, Dropout):
                    own.tokens_first = not layer.self_attn.batch_first
