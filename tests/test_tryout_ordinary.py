"""Models, losses and data as anyone has them give no finding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hybrid.models.losses import cross_entropy
from hybrid.training.check import look_at_job
from tests.tryout_jobs import make_job


class Block(nn.Module):
    """Attention over tokens with a causal mask of -inf, and nn.Dropout; nanoGPT's, in short."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out, self.drop = nn.Linear(width, width), nn.Dropout(0.2)
        self.register_buffer("mask", torch.full((16, 16), float("-inf")).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        rows, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).view(rows, tokens, self.heads, -1).transpose(1, 2)
        q, k, v = parts.chunk(3, -1)
        scores = q @ k.transpose(2, 3) / 4 + self.mask[:tokens, :tokens]
        mixed = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(rows, tokens, width)
        return x + self.drop(self.out(mixed))


class Tokens(nn.Module):
    """Embeds tokens and their places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(61, width), nn.Embedding(16, width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [batch, tokens] to [batch, tokens, width]."""
        return self.words(ids) + self.places(torch.arange(ids.shape[1]))


def language() -> Any:
    """A small GPT with tied embeddings."""
    first, head = Tokens(21), nn.Linear(21, 61, bias=False)
    head.weight = first.words.weight
    return [first, *[Block(21, 3) for _ in range(5)], head], cross_entropy


class Pictures(nn.Module):
    """A small ResNet with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        x = self.first(x.view(-1, 1, 4, 4))
        return self.head(torch.relu(x + self.second(x)).mean((2, 3)))


class Patches(nn.Module):
    """A small ViT with torch's own encoder, without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Linear(4, 12), nn.Parameter(torch.zeros(1, 1, 12))
        layer = nn.TransformerEncoderLayer(12, 3, 24, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        parts = self.embed(x.view(-1, 4, 4))
        return self.head(self.encoder(torch.cat([self.cls.expand(len(x), 1, 12), parts], 1))[:, 0])


class Classifier(nn.Module):
    """A small BERT: a dict of ids and a mask of padding, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.drop, self.head = nn.Embedding(61, 12), nn.Dropout(0.3), nn.Linear(12, 4)
        self.query, self.key = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A dict of int64 [batch, tokens] to [batch, 4]."""
        x = self.drop(self.words(batch["ids"]))
        hidden = batch["mask"][:, None, :] == 0
        scores = (self.query(x) @ self.key(x).transpose(1, 2)).masked_fill(hidden, float("-inf"))
        return self.head((scores.softmax(-1) @ x)[:, 0])


class Recurrent(nn.Module):
    """An LSTM, which returns a tuple to the layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 9, batch_first=True, num_layers=2), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        return self.head(self.lstm(x.view(-1, 4, 4))[0][:, -1])


class Physics(nn.Module):
    """The slope of a net by its input, as equations of physics ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 1, bias=False))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope[:, :4] * self.scale


class Experts(nn.Module):
    """Two experts, both of which every sample meets, in shares of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.a, self.b = nn.Linear(16, 2), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4], one class of which is masked."""
        share = self.gate(x).softmax(-1)
        scores = share[:, :1] * self.a(x) + share[:, 1:] * self.b(x)
        return torch.cat([scores[:, :3], scores[:, 3:] + torch.zeros(1)], 1)


def likelihood(output: torch.Tensor, target: torch.Tensor) -> Any:
    """Gaussian, with a mean and a logarithm of the variance; its sum can be near zero."""
    mean, spread = output.chunk(2, 1)
    return (spread + (target.view(-1, 1) - mean) ** 2 / spread.exp()).sum(), target.numel() * 2


def weighted(output: torch.Tensor, target: torch.Tensor) -> Any:
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    return F.cross_entropy(output, target, weight, reduction="sum"), len(target)


def ordinary(kind: str) -> Any:
    """Models, losses and data as anyone has them."""
    return ORDINARY[kind][0]()


def sentences(masks: bool = False) -> Any:
    """Token ids, with the next tokens of which some do not count, or a class and a mask."""
    ids = torch.randint(61, (30, 9), generator=torch.Generator().manual_seed(1))
    samples: list[Any] = []
    for i, row in enumerate(ids):
        mask = (torch.arange(8) < 3 + i % 5).long()
        target = row[1:].masked_fill(mask == 0, -100)
        samples.append(({"ids": row[:-1], "mask": mask}, i % 4) if masks else (row[:-1], target))
    return samples, samples[:7]


PLAIN = {"name": "random", "options": {"features": 16, "classes": 4, "samples": 50}}
LANGUAGE = {"name": "tests.test_tryout_ordinary:sentences"}
MASKED = {"name": "tests.test_tryout_ordinary:sentences", "options": {"masks": True}}
ORDINARY: dict[str, tuple[Any, dict[str, Any]]] = {
    "language": (language, LANGUAGE),
    "pictures": (lambda: ([Pictures()], cross_entropy), PLAIN),
    "patches": (lambda: ([Patches()], cross_entropy), PLAIN),
    "classifier": (lambda: ([Classifier()], cross_entropy), MASKED),
    "recurrent": (lambda: ([Recurrent()], cross_entropy), PLAIN),
    "physics": (lambda: ([Physics()], cross_entropy), PLAIN),
    "experts": (lambda: ([Experts()], cross_entropy), PLAIN),
    "weights": (lambda: ([nn.Linear(16, 4)], weighted), PLAIN),
    "instances": (
        lambda: (
            [nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4), nn.Flatten(), nn.Linear(16, 4)],
            cross_entropy,
        ),
        PLAIN,
    ),
    "half frozen": (
        lambda: ([nn.Linear(16, 9).requires_grad_(False), nn.Linear(9, 4)], cross_entropy),
        PLAIN,
    ),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_what_is_ordinary_gives_no_finding(kind: str) -> None:
    model = {"name": "tests.test_tryout_ordinary:ordinary", "options": {"kind": kind}}
    checked = look_at_job(make_job(model=model, data=ORDINARY[kind][1]))
    found = [f.text for f in checked.findings]
    if kind == "pictures":  # a batch norm is named, and mixes, and is no other finding
        assert len(found) == 1 and "0.first.1 (BatchNorm2d)" in found[0]
    else:
        assert found == []
