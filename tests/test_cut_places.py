"""Where a module is cut, which of its modules are units, and why another cannot be cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybrid.models.brought import as_layers
from hybrid.models.cutting.layers import ModuleLayers
from tests import brought_models as brought
from tests.test_cutting import ROWS, Chain, cut, make, uses_again


def skips(self: Any, x: torch.Tensor) -> torch.Tensor:
    first = second = self.blocks[0](self.stem(x))
    for block in self.blocks[1:]:
        second = torch.relu(block(second))
    return self.head(first + second)


def masks(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.blocks[0](self.stem(x))
    mask = (x > 0).float()  # leaves no graph
    for block in self.blocks[1:]:
        x = block(x) * mask
    return self.head(x)


def rests(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    sums = []
    for block in self.blocks:
        x = block(x)
        sums.append(x.detach().sum())
    return self.head(x) * torch.stack(sums).sum()


def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    for block in [*self.blocks, *self.blocks]:
        x = block(x)
    return self.head(x)


def moves(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.norm(self.stem(x))
    for block in self.blocks:
        x = block(x)
    return self.head(self.norm(x))


def raises(self: Any, x: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such thing")


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (skips, "its other part takes values of other blocks beside the hidden state"),
        (masks, "the code between its blocks 1 and 2 depends on what other blocks computed"),
        (rests, "what comes behind its blocks depends on what other blocks computed, beside"),
        (twice, "no nn.ModuleList or nn.Sequential whose modules run once each, in order"),
        (moves, "the buffer norm.running_mean changes in several of its parts"),
        (raises, "a trial with two samples failed: KeyError: 'no such thing'"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(way: Any, reason: str) -> None:
    layers = cut(Chain(way), ROWS)
    said = str(layers.cut_problem)
    assert reason in said and "\n" not in said and said.endswith("takes what the last returned")
    assert len(layers) == 1 and layers.blocks() == list(layers.model.blocks)
    with pytest.raises(ValueError, match="to cut it by hand, return a list of layers"):
        layers.join(range(0))


def test_lists_within_lists_and_the_largest_list_alone() -> None:
    def pair(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.Tanh())

    flat = cut(nn.Sequential(nn.Linear(6, 5), pair(5), pair(5), nn.Linear(5, 3)), ROWS)
    assert isinstance(flat, ModuleLayers) and len(flat) == 6 + 2 and flat.cut_problem is None
    assert list(flat.tensors())[2] == "1.0.weight"

    class Towers(nn.Module):
        """Two towers whose results are summed: only one can be cut."""

        def __init__(self) -> None:
            super().__init__()
            self.small = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3))
            self.large = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.large(x) + self.small(x)

    towers = cut(Towers(), ROWS)
    assert towers.cut_problem is None
    assert [b.name for b in towers.plan.blocks] == ["large.0", "large.1", "large.2"]


class EncoderDecoder(nn.Module):
    """Each block of the second list takes what the first list returned."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.decoder = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start = x
        for block in self.encoder:
            x = torch.tanh(block(x))
        memory, x = x, start * 2
        for block in self.decoder:
            x = torch.tanh(block(x) + memory)
        return x


def test_the_cut_that_repeats_least_is_taken() -> None:
    layers = cut(EncoderDecoder(), ROWS)
    assert layers.cut_problem is None, "the decoder may be cut too, with the encoder everywhere"
    assert [b.name for b in layers.plan.blocks] == [f"encoder.{i}" for i in range(3)]
    assert layers.sizes() == [0, 42, 42, 42, 4 * 42]


def test_a_dict_of_modules_is_no_block_since_it_does_not_run() -> None:
    pair = {"gate": nn.Linear(6, 2), "experts": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])}
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict(pair), nn.ModuleDict({"one": nn.Linear(6, 6)})])
    experts = list(pair["experts"].children())
    assert as_layers(model).blocks() == as_layers(model).units() == experts


def test_units_are_repeated_blocks_that_share_nothing() -> None:
    kinds = {"bert": "BertLayer", "nanogpt": "PreNormBlock", "resnet": "BasicBlock"}
    for name, kind in kinds.items():
        layers = make(name)[0] if name == "bert" else as_layers(getattr(brought, name)()[0])
        assert {type(u).__name__ for u in layers.units()} == {kind}
        assert len(layers.units()) == len(layers.blocks())
    model = Chain(uses_again)
    model.blocks[2].weight = model.blocks[1].weight  # type: ignore[union-attr]
    model.head.bias = model.blocks[0].bias  # type: ignore[union-attr]
    assert as_layers(model).units() == [model.blocks[3]]
    alone = nn.Linear(3, 3)
    assert as_layers(alone).units() == [] and as_layers(alone).blocks() == [alone]
