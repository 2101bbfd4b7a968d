"""Makes the models of the random jobs: small ones of the kinds that people train.

Each function returns `(layers, loss)`. The layers are of many makes on purpose: containers of
torch, own classes, biases whose gradient is rounding (a key's), a parameter that is used twice, a
buffer, a tied head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

import hybrid
from hybrid.models.layers import Layers
from hybrid.models.losses import Loss

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}


def squared_error(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the squared error, summed in fp32 over every element, and their number."""
    return (output.float() - target).square().sum(), target.numel()


def huber(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return Huber's loss with its bend at 1, summed in fp32 over every element, and their
    number."""
    return functional.huber_loss(output.float(), target, reduction="sum"), target.numel()


LOSSES: dict[str, Loss] = {
    "cross_entropy": hybrid.cross_entropy,
    "squared_error": squared_error,
    "huber": huber,
}


def perceptron(
    sizes: Sequence[int], activation: str, norm: bool, dropout: float, loss: str
) -> tuple[list[nn.Module], Loss]:
    """Make layers sizes[0] -> ... -> sizes[-1], each but the last with a norm, an activation and
    dropout behind it."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes[:-1]):
        parts: list[nn.Module] = [nn.Linear(before, after)]
        parts += [nn.LayerNorm(after)] if norm else []
        parts += [ACTIVATIONS[activation]()]
        parts += [nn.Dropout(dropout)] if dropout else []
        layers.append(nn.Sequential(*parts))
    return [*layers, nn.Linear(sizes[-2], sizes[-1])], LOSSES[loss]


class Residual(nn.Module):
    """Adds a function of its input to it; has a buffer and uses a parameter twice."""

    shift: torch.Tensor

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.activation = ACTIVATIONS[activation]()
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, width] to the same shape."""
        inner = self.first(x) * self.scale + self.shift.to(x.dtype)
        return x + self.scale * self.second(self.activation(inner))


def residual(
    features: int, width: int, depth: int, outputs: int, activation: str, loss: str
) -> tuple[list[nn.Module], Loss]:
    """Make a linear map, `depth` residual layers and a linear map to the outputs."""
    inner = [Residual(width, activation) for _ in range(depth)]
    return [nn.Linear(features, width), *inner, nn.Linear(width, outputs)], LOSSES[loss]


class Flatten(nn.Module):
    """Averages a map of channels over its pixels, and maps it to the outputs."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.out = nn.Linear(channels, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, channels, height, width] to [batch, outputs]."""
        return self.out(x.mean((2, 3)))


def convolution(
    channels: Sequence[int], activation: str, norm: bool, outputs: int, loss: str
) -> tuple[list[nn.Module], Loss]:
    """Make convolutions of 3 x 3 pixels over images [1, 8, 8], with group norms or without."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise([1, *channels]):
        parts: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1)]
        parts += [nn.GroupNorm(1, after)] if norm else []
        layers.append(nn.Sequential(*parts, ACTIVATIONS[activation]()))
    return [*layers, Flatten(channels[-1], outputs)], LOSSES[loss]


class Embed(nn.Module):
    """Maps token ids to vectors with learned positions."""

    def __init__(self, vocab_size: int, tokens: int, width: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocab_size, width), nn.Embedding(tokens, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64 [batch, tokens] to [batch, tokens, width]."""
        return self.token(ids) + self.place(torch.arange(ids.shape[1], device=ids.device))


class Block(nn.Module):
    """Is a block of a transformer with biases everywhere, normed before or after each half."""

    def __init__(self, width: int, num_heads: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] to the same shape."""
        normed = self.norm1(x)
        q, k, v = (self._heads(part(normed)) for part in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.down(self.activation(self.up(self.norm2(x)))))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        return x.view(batch, tokens, self.num_heads, -1).transpose(1, 2)


class Head(nn.Module):
    """Applies a norm and the projection to logits."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] to [batch, tokens, vocab_size]."""
        return self.logits(self.norm(x))


def transformer(
    num_layers: int,
    width: int,
    num_heads: int,
    vocab_size: int,
    tokens: int,
    activation: str,
    dropout: float,
    tied: bool,
) -> tuple[Layers, Loss]:
    """Make a decoder with biases, also of queries, keys and values, and cross-entropy."""
    embed, head = Embed(vocab_size, tokens, width), Head(width, vocab_size)
    for table in (embed.token, embed.place):
        nn.init.normal_(table.weight, std=0.1)
    if tied:
        head.logits.weight = embed.token.weight
    blocks = [Block(width, num_heads, activation, dropout) for _ in range(num_layers)]
    return Layers([embed, *blocks, head]), hybrid.cross_entropy


class Mean(nn.Module):
    """Maps each token's vector, averages over the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [batch, tokens, width] to [batch, width]."""
        return torch.tanh(self.inner(x)).mean(1)


def bag(
    vocab_size: int, width: int, depth: int, outputs: int, activation: str, loss: str
) -> tuple[list[nn.Module], Loss]:
    """Make a classifier of bags of tokens: an embedding, a mean, `depth` layers, a linear map."""
    inner = [
        nn.Sequential(nn.Linear(width, width), ACTIVATIONS[activation]()) for _ in range(depth)
    ]
    first: list[nn.Module] = [nn.Embedding(vocab_size, width), Mean(width)]
    return [*first, *inner, nn.Linear(width, outputs)], LOSSES[loss]
