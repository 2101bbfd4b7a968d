"""This module makes a decoder-only transformer as a list of layers: embedding, blocks, head.

It has pre-norm blocks (Radford et al. 2019, GPT-2), rotary positions (Su et al. 2021,
https://arxiv.org/abs/2104.09864) or learned ones, attention by torch's
`scaled_dot_product_attention`, and embeddings tied to the head or not (Press and Wolf 2017,
https://arxiv.org/abs/1608.05859)."""

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from .dropout import Dropout
from .layers import Layers
from .losses import Loss, cross_entropy
from .presets import BYTES, CONTEXT, MOST_LAYERS, PRESETS, SIZES

INIT_STD = 0.02


class Linear(nn.Linear):
    """Is torch's, drawn from a normal distribution of standard deviation `std`, with no bias."""

    std: float | None = None  # None: as torch draws it

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        if self.std is None:
            return super().reset_parameters()
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Table(nn.Embedding):
    """Is torch's, drawn from a normal distribution of standard deviation `std`."""

    std = 1.0

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Module):
    """Maps token ids to vectors, and adds learned positions if the model has them."""

    def __init__(
        self, vocab_size: int, width: int, context: int, learned: bool, dropout: float
    ) -> None:
        super().__init__()
        self.context = context
        self.token = Table(vocab_size, width)
        self.position = Table(context, width) if learned else None
        self.dropout = Dropout(dropout)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps int64 [batch, tokens] to [batch, tokens, width].

        Raises ValueError for more tokens than `context`."""
        if ids.shape[1] > self.context:
            raise ValueError(
                f"model.options.context = {self.context}: the data's samples have "
                f"{ids.shape[1]} tokens; make it as many or more"
            )
        x = self.token(ids)
        if self.position is not None:
            x = x + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.dropout(x)


class Attention(nn.Module):
    """Computes causal self-attention; `rotary` turns queries and keys by their positions."""

    inverse_frequency: torch.Tensor

    def __init__(self, width: int, num_heads: int, rotary: bool) -> None:
        super().__init__()
        self.num_heads, self.rotary = num_heads, rotary
        # A key's bias adds the same to all scores of a query. Its gradient is only rounding, which
        # AdamW would turn into whole steps, in other directions in each of two equal runs.
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width)
        if rotary:
            pairs = torch.arange(0, width // num_heads, 2, dtype=torch.float32)
            self.register_buffer("inverse_frequency", 10_000.0 ** (-pairs * num_heads / width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, tokens, width] to the same shape."""
        batch, tokens, width = x.shape
        heads = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, head width]
        if self.rotary:
            at = torch.arange(tokens, device=x.device, dtype=torch.float32)
            angles = torch.outer(at, self.inverse_frequency)
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (i, i + half) of the last axis by its angle; cos, sin: [tokens, half]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """Adds attention and then a four times wider GELU network to its input, each normed first."""

    def __init__(self, width: int, num_heads: int, rotary: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, num_heads, rotary)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, tokens, width] to the same shape."""
        x = x + self.dropout1(self.attention(self.norm1(x)))
        return x + self.dropout2(self.down(functional.gelu(self.up(self.norm2(x)))))


class Head(nn.Module):
    """Applies the last norm and the projection to logits."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = Linear(width, vocab_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, tokens, width] to logits [batch, tokens, vocab_size]."""
        return self.logits(self.norm(x))


def gpt(
    preset: str | None = None,
    num_layers: int | None = None,
    width: int | None = None,
    num_heads: int | None = None,
    context: int | None = None,
    vocab_size: int | None = None,
    tied: bool = True,
    positions: Literal["rope", "learned"] = "rope",
    dropout: float = 0.0,
) -> tuple[Layers, Loss]:
    """Makes `num_layers` blocks between embedding and head, and cross-entropy in nats a token.

    Sizes come from `preset`, and each size's own argument overrides it. Without a preset,
    `num_layers`, `width` and `num_heads` are needed, `context` is 1024 and `vocab_size` that of the
    bytes. `dropout` is on the embedding and on what each half of a block adds, not on attention
    weights. Raises ValueError where sizes do not fit."""
    given = (num_layers, width, num_heads, context, vocab_size)
    num_layers, width, num_heads, context, vocab_size = _sizes(preset, given)
    _check(width, num_heads, tied, positions, dropout)
    rotary = positions == "rope"
    embedding = Embedding(vocab_size, width, context, not rotary, dropout)
    blocks = [Block(width, num_heads, rotary, dropout) for _ in range(num_layers)]
    head = Head(width, vocab_size)
    layers = Layers([embedding, *blocks, head])
    _init(layers, num_layers)
    if tied:
        head.logits.weight = embedding.token.weight
    return layers, cross_entropy


def _sizes(preset: str | None, given: tuple[int | None, ...]) -> tuple[int, int, int, int, int]:
    defaults: tuple[int | None, ...] = (None, None, None, CONTEXT, BYTES)
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset = {preset!r}: valid: {', '.join(PRESETS)}")
        defaults = PRESETS[preset]
    chosen: Any = tuple(d if g is None else g for g, d in zip(given, defaults, strict=True))
    for name, value in zip(SIZES, chosen, strict=True):
        if value is None:
            raise ValueError(f"{name} is missing; give it, or a preset: {', '.join(PRESETS)}")
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} = {value!r}: a whole number, 1 or more, is needed")
    if chosen[0] > MOST_LAYERS:
        raise ValueError(f"num_layers = {chosen[0]}: valid: 1 to {MOST_LAYERS}")
    return chosen


def _check(width: int, num_heads: int, tied: bool, positions: str, dropout: float) -> None:
    if type(tied) is not bool:
        raise ValueError(f"tied = {tied!r}: valid: true, false")
    if positions not in ("rope", "learned"):
        raise ValueError(f"positions = {positions!r}: valid: rope, learned")
    if width % num_heads or (positions == "rope" and width // num_heads % 2):
        even = " into even parts" if positions == "rope" else ""
        raise ValueError(f"num_heads = {num_heads}: does not divide width = {width}{even}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout = {dropout!r}: valid: 0 up to, not including, 1")


def _init(layers: Layers, num_layers: int) -> None:
    """Draws normal weights as GPT-2, smaller before the residual stream's sums; biases are zero."""
    for layer in layers:
        for name, module in layer.named_modules():
            if isinstance(module, (Linear, Table)):
                adds = name in ("down", "attention.out")
                module.std = INIT_STD / math.sqrt(2 * num_layers) if adds else INIT_STD
                if not module.weight.is_meta:
                    module.reset_parameters()
