"""Models whose losses and metrics are as a user has them, for the tests of losses."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCABULARY = 101


class Rows(torch.utils.data.Dataset[Any]):
    """Gives an input [16] and a target of several parts: a class in a dict, and a number."""

    def __init__(self, size: int) -> None:
        self.inputs = torch.randn(size, 16, generator=torch.Generator().manual_seed(size))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> Any:
        row = self.inputs[i]
        return row, ({"kind": int(row.sum() > 0) + 2 * (i % 2)}, row.mean())


def rows() -> tuple[Rows, Rows]:
    """25 samples, which batches of 7 do not divide, and 13."""
    return Rows(25), Rows(13)


class Heads(nn.Module):
    """Returns class scores, and a mean with its log variance, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.numbers = nn.Linear(12, 5), nn.Linear(12, 2)

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.classes(hidden), "numbers": self.numbers(hidden)}


def several() -> Any:
    """Two losses summed: one with class weights, one with two numbers for each target."""
    weight = torch.tensor([1.0, 2.0, 0.3, 3.1, 0.7])

    def loss(output: Any, target: Any) -> Any:
        kind = target[0]["kind"]
        total = functional.cross_entropy(output["scores"], kind, weight, reduction="sum")
        mean, spread = output["numbers"].unbind(1)
        total = total + (0.5 * (spread + (target[1] - mean) ** 2 / spread.exp())).sum()
        return total, weight[kind].sum()

    hidden = nn.Sequential(nn.Linear(16, 12), nn.Tanh())
    return [hidden, Heads()], loss


class OwnLoss(nn.Module):
    """Returns logits and its own mean loss: over all targets but -1, or over the next tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.head = nn.Embedding(VOCABULARY, 12), nn.Linear(12, VOCABULARY)

    def forward(self, given: Any) -> Any:
        tokens, target = given if isinstance(given, tuple) else (given, None)
        logits = self.head(self.embedding(tokens).tanh())
        if target is None:
            return logits
        flat = logits.view(-1, VOCABULARY)
        if self.kind == "next":
            target = functional.pad(target, (0, 1), value=-100)[:, 1:]
            return {"loss": functional.cross_entropy(flat, target.flatten()), "logits": logits}
        mean = functional.cross_entropy(flat, target.flatten(), ignore_index=-1)
        return logits, mean + 0.1 if self.kind == "more" else mean


def own(kind: str = "all") -> Any:
    return [OwnLoss(kind)], None


class Tokens(torch.utils.data.Dataset[Any]):
    """Gives nine tokens and as many targets, the first of some rows being -1."""

    def __init__(self, size: int) -> None:
        self.tokens = torch.randint(0, VOCABULARY, (size, 10))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Any:
        target = self.tokens[i, 1:].clone()
        target[: i % 4] = -1
        return self.tokens[i, :-1], target


def tokens() -> tuple[Tokens, Tokens]:
    torch.manual_seed(3)
    return Tokens(25), Tokens(13)


def far(output: Any, target: Any) -> tuple[torch.Tensor, int]:
    """How far the predicted number is from the target."""
    return (output["numbers"][:, 0] - target[1]).abs().sum(), len(target[1])


def hits(output: Any, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ((output[0].argmax(-1) == target).sum(), (target != -1).sum())


def single_number(output: Any, target: Any) -> Any:
    return output.sum()


def loud() -> Any:
    """A loss whose gradient for one sample overflows fp16 at a loss scale of 65,536."""
    layers = [nn.Sequential(nn.Linear(32, 24), nn.Tanh()), nn.Linear(24, 10)]

    def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
        total = functional.cross_entropy(output.float(), target, reduction="sum")
        return 1.8 * total, len(target)

    return layers, loss
