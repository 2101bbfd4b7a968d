"""What a model is to the engines: layers, their names, and how stages share tied parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybrid.engines.state import named_tensors
from hybrid.job.errors import JobError
from hybrid.launch.placement import Placement
from hybrid.layout import Layout
from hybrid.models import build_model
from hybrid.models.gpt import gpt
from hybrid.models.layers import Layers, holders_of
from hybrid.stages.assignment import StageAssignment
from tests.conftest import small_job


class Tied(nn.Module):
    """A projection by a matrix that another layer has too."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.shared = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 4] to [batch, 4]."""
        return x @ self.shared.T


class Buffered(nn.Module):
    """A layer with a buffer and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 1.5))
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 4] to [batch, 4]."""
        return x * self.scale + self.shift


def chain() -> Layers:
    """Six layers: 0, 3 and 5 share a matrix (layer 3 under another name), 2 has no parameter."""
    torch.manual_seed(0)
    first = nn.Linear(4, 4)
    last = nn.Linear(4, 4, bias=False)
    last.weight = first.weight
    return Layers([first, Buffered(), nn.Tanh(), Tied(first.weight), nn.Linear(4, 4), last])


NAMES = ["0.weight", "0.bias", "1.scale", "4.weight", "4.bias"]


def tiny_gpt(**options: Any) -> Layers:
    """Four layers: embedding, two blocks, head."""
    return gpt(num_layers=2, width=8, num_heads=2, context=8, vocab_size=11, **options)[0]


# --- layers ---


def test_tensors_are_named_by_their_first_place_and_each_once() -> None:
    layers = chain()
    tensors = layers.tensors()
    assert list(tensors) == [*NAMES[:3], "1.shift", *NAMES[3:]]
    assert tensors["0.weight"] is layers[5].weight is layers[3].shared
    assert list(layers.names().values()) == NAMES
    assert layers.names()[layers[5].weight] == "0.weight"
    assert all(layers.tensors()[name] is p for p, name in layers.names().items())


def test_the_whole_model_has_the_canonical_names_and_runs_the_chain() -> None:
    layers = chain()
    x = torch.randn(3, 4)
    expected = x
    for layer in layers:
        expected = layer(expected)
    whole = layers.whole()
    assert torch.equal(whole(x), expected)
    assert [name for name, _ in whole.named_parameters()] == NAMES
    assert layers.names().keys() == set(whole.parameters())


def test_parts_run_one_after_another_as_the_whole() -> None:
    layers, x = chain(), torch.randn(3, 4)
    expected = layers.whole()(x)
    parts = [layers.join(range(0, 1)), layers.join(range(1, 4)), layers.join(range(4, 6))]
    for part in parts:
        x = part(x)
    assert torch.equal(x, expected)
    assert [n for n, _ in parts[1].named_parameters()] == ["1.scale", "3.shared"]
    assert [n for n, _ in parts[2].named_parameters()] == ["4.weight", "4.bias", "5.weight"]


def test_holders_are_all_layers_of_a_parameter_in_order() -> None:
    layers = chain()
    holders = holders_of(layers)
    by_name = {name: holders[p] for p, name in layers.names().items()}
    assert by_name == {
        "0.weight": [0, 3, 5],
        "0.bias": [0],
        "1.scale": [1],
        "4.weight": [4],
        "4.bias": [4],
    }


def test_sizes_count_a_tied_parameter_in_each_layer_and_only_what_trains() -> None:
    layers = chain()
    assert layers.sizes() == [20, 4, 0, 16, 20, 16]
    layers[4].bias.requires_grad_(False)
    assert layers.sizes() == [20, 4, 0, 16, 16, 16]


def test_units_are_the_layers_that_share_no_parameter() -> None:
    layers = chain()
    assert layers.units() == [layers[1], layers[4]], "by object: layers 0, 3 and 5 share a weight"
    tied, untied = tiny_gpt(), tiny_gpt(tied=False)
    assert tied.units() == tied[1:-1] and untied.units() == list(untied)


def test_a_layer_that_stands_twice_is_no_unit() -> None:
    twice, alone = nn.Linear(4, 4), nn.Linear(4, 4)
    inner = nn.Sequential(twice, nn.Linear(4, 4))
    assert Layers([twice, alone, twice]).units() == [alone]
    assert Layers([inner, alone, twice]).units() == [alone], "one module inside another"
    pair = nn.Sequential(alone, nn.Tanh(), alone)
    assert Layers([pair, twice, nn.Tanh()]).units() == [pair, twice], "its own twice is its own"


def test_a_plain_list_of_a_user_becomes_layers() -> None:
    layers, _ = build_model(small_job(model={"name": "tests.workloads:regression"}))
    assert type(layers) is Layers and layers.blocks() == list(layers)
    assert layers.cut_problem is None


# --- cuts ---


def at(layout: Layout, rank: int) -> Placement:
    """A rank of a layout."""
    return Placement(rank, layout.world_size, layout=layout)


def cut(
    layers: Layers, stage: int, method: Any = "uniform", pp: int = 3, dp: int = 1
) -> StageAssignment:
    """The cut as the first column's rank of a stage sees it."""
    return StageAssignment(layers, method, at(Layout(pp=pp, dp=dp, replicate=dp), stage * dp))


def test_every_rank_sees_the_same_cut_and_its_own_part() -> None:
    for method, parts in (
        ("uniform", [[0, 1, 2], [3, 4], [5]]),
        ("parameters", [[0], [1, 2, 3], [4, 5]]),
        ([1, 4, 1], [[0], [1, 2, 3, 4], [5]]),
    ):
        for stage in range(3):
            seen = cut(chain(), stage, method)
            assert seen.layers_by_stage == parts, method
            assert (seen.stage, list(seen.part)) == (stage, parts[stage])
    columns = Layout(pp=2, dp=2, replicate=2)
    parts = [list(StageAssignment(chain(), [2, 4], at(columns, rank)).part) for rank in range(4)]
    assert parts == [[0, 1], [0, 1], [2, 3, 4, 5], [2, 3, 4, 5]]


def test_a_partition_that_does_not_fit_is_refused_in_one_line() -> None:
    for sizes in ([3, 3], [2, 2, 1], [1, 1, 1, 3]):
        with pytest.raises(JobError) as refused:
            cut(chain(), 0, sizes)
        assert str(sizes) in str(refused.value) and "\n" not in str(refused.value)


def test_stages_name_what_they_hold_canonically() -> None:
    expected = [
        ["0.weight", "0.bias", "1.scale"],
        ["0.weight", "4.weight", "4.bias"],
        ["0.weight"],
    ]
    for stage, names in enumerate(expected):
        layers = chain()
        whole = {name: p for p, name in layers.names().items()}
        own = cut(layers, stage)
        held = own.parameters(layers.join(own.part))
        assert list(held) == names
        assert all(held[name] is whole[name] for name in names)


def test_a_tied_head_is_the_embedding_by_name() -> None:
    for tied, name in ((True, "0.token.weight"), (False, "3.logits.weight")):
        layers = tiny_gpt(tied=tied)
        own = cut(layers, 2, [1, 2, 1])
        stage = layers.join(own.part)
        assert sorted(own.parameters(stage)) == sorted([name, "3.norm.bias", "3.norm.weight"])
        assert own.parameters(stage)[name] is stage[0].logits.weight


def test_a_tied_parameter_is_the_first_stages_to_give_and_every_holders_to_take() -> None:
    expected = [
        (["0.weight", "0.bias", "1.scale", "1.shift"], []),
        (["4.weight", "4.bias"], ["0.weight"]),
        ([], ["0.weight"]),
    ]
    for stage, (given, shared) in enumerate(expected):
        layers = chain()
        own = cut(layers, stage)
        # DeepSpeed numbers the stages in front of the names.
        live = nn.ModuleDict({str(stage): layers.join(own.part)})
        assert sorted(own.own_tensors(named_tensors(live), shared=False)) == sorted(given)
        assert sorted(own.own_tensors(named_tensors(live), shared=True)) == sorted(given + shared)


def test_live_layers_are_read_off_what_a_stage_holds() -> None:
    layers = chain()
    own = cut(layers, 0)
    stage = layers.join(own.part)
    assert own.live_layers(stage) == [0, 1, 2]
    del stage[1]
    assert own.live_layers(stage) == [0, 2], "a layer that is gone is still told of"
    other = cut(layers, 1)
    assert other.live_layers(layers.join(range(3, 5))) == [3, 4]
    assert 1 not in other.live_layers(layers.join(range(0, 3)))


def test_tied_digests_tell_one_bit_apart() -> None:
    digests = []
    for stage in range(3):
        layers = chain()
        own = cut(layers, stage)
        digests.append(own.tied_digest())
        with torch.no_grad():
            layers[0].weight[2, 1] = torch.nextafter(layers[0].weight[2, 1], torch.tensor(9.0))
        assert own.tied_digest() != digests[-1]
    assert [list(digest) for digest in digests] == [["0.weight"]] * 3
    assert StageAssignment.tied_agree(digests) and StageAssignment.tied_agree([{}, digests[0], {}])
    assert not StageAssignment.tied_agree([digests[0], {"0.weight": "other"}, digests[2]])
    assert not StageAssignment.tied_agree([digests[0], {}, {"0.weight": "other"}])
    assert cut(tiny_gpt(tied=False), 0).tied_digest() == {}


def test_holders_of_a_tied_parameter_sum_in_their_column(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []

    def new_group(ranks: list[int]) -> tuple[int, ...]:
        made.append(ranks)
        return tuple(ranks)

    monkeypatch.setattr(torch.distributed, "new_group", new_group)
    columns = Layout(pp=3, dp=2, replicate=2)
    for rank in range(6):
        layers = chain()  # cut into [0, 1, 2], [3, 4], [5], which all hold the matrix of layer 0
        extra = nn.Parameter(torch.ones(4))
        layers[4].bias = extra
        layers[5].bias = extra  # held by the last two stages
        made.clear()
        tied = StageAssignment(layers, "uniform", at(columns, rank)).tied()
        # Every rank makes every group, in one order: torch would wait for ever otherwise.
        assert made == [[0, 2, 4], [1, 3, 5], [2, 4], [3, 5]], rank
        stage, column = rank // 2, rank % 2
        expected = [(layers[0].weight, (column, column + 2, column + 4), stage == 0)]
        if stage:
            expected.append((extra, (column + 2, column + 4), stage == 1))
        assert len(tied) == len(expected)
        for (p, group, first), (q, ranks, counts) in zip(tied, expected, strict=True):
            assert p is q and (group, first) == (ranks, counts), rank


def test_a_frozen_tied_parameter_has_no_gradient_to_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "new_group", tuple)
    layers = chain()
    layers[0].weight.requires_grad_(False)
    own = cut(layers, 0)
    assert own.tied() == [] and list(own.tied_digest()) == ["0.weight"]


def test_a_parameter_shared_inside_a_stage_is_not_tied_across_stages() -> None:
    own = cut(chain(), 0, [6], pp=1)
    assert own.tied_digest() == {} and own.tied() == []
