"""Dropout whose mask depends on the seed, the step, the sample and the place in the model alone.

torch's own draws from one stream a process, so that each layout of ranks and micro-batches drops
other units and no two can be compared. Here each row of a batch has a stream of its own, seeded by
what the row is: every strategy drops the same units, and activations that are computed again in
backward meet the mask they had.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import nn

Seeds = Sequence[int | None]
_rows: ContextVar[tuple[int | None, ...] | None] = ContextVar("rows", default=None)


def mix(*numbers: int) -> int:
    """A seed from numbers, 63 bits; other numbers, or another order of them, give another one."""
    digest = hashlib.blake2b(b"".join(n.to_bytes(16, "little", signed=True) for n in numbers))
    return int.from_bytes(digest.digest()[:8], "little") >> 1


@contextlib.contextmanager
def use_rows(seeds: Seeds | None) -> Iterator[None]:
    """While it lasts, the rows of a batch, axis 0, have these seeds, one each; a row without one is
    padding and is left as it is. No seeds at all: dropout draws from torch's own stream."""
    token = _rows.set(None if seeds is None else tuple(seeds))
    try:
        yield
    finally:
        _rows.reset(token)


def set_rows(seeds: Seeds) -> None:
    """`use_rows` without an end."""
    _rows.set(tuple(seeds))


def rows_in_use() -> tuple[int | None, ...] | None:
    """What `use_rows` was last given."""
    return _rows.get()


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws row by row under `use_rows`. `place` tells apart the dropouts of one
    model; `number_dropouts` sets it."""

    place = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, ...] to the same shape; or [rows * n, ...], n lines a row, such as its tokens."""
        if not self.training or self.p == 0.0:
            return x
        seeds = _rows.get()
        if not seeds or x.shape[0] % len(seeds):
            return super().forward(x)
        return x * _mask(x, seeds, self.place, 1.0 - self.p)


@torch.compiler.disable
def _mask(x: torch.Tensor, seeds: Seeds, place: int, keep: float) -> torch.Tensor:
    mask = torch.ones(x.shape, device=x.device)  # fp32 in each precision, so that all draw alike
    for row, seed in zip(mask.chunk(len(seeds)), seeds, strict=True):
        if seed is not None:
            draw = torch.Generator(x.device).manual_seed(mix(seed, place))
            row.bernoulli_(keep, generator=draw).div_(keep)
    return mask.to(x.dtype)


def number_dropouts(modules: Sequence[nn.Module]) -> None:
    """Turn every `nn.Dropout` in a model into a `Dropout` with a place of its own. To be called on
    the whole model, before it is cut: places count through it."""
    found = [m for top in modules for m in top.modules() if isinstance(m, nn.Dropout)]
    for place, module in enumerate(dict.fromkeys(found)):
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
        if isinstance(module, Dropout):
            module.place = place
