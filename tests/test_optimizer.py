"""Parameter groups, weight decay that is really left out, learning rates of live optimizers.

The schedule's values are in test_models.py, fp16's loss scale is in test_loss_scale.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.data.loader import MicroBatch
from hybrid.engines.optimizer import (
    LossScale,
    build_optimizer,
    count_groups,
    no_decay_names,
    read_learning_rate,
    rounds_by_place,
    set_learning_rate,
)
from hybrid.job.errors import RunError, Unsupported
from hybrid.launch.process_group import cleanup
from hybrid.models import build_model
from hybrid.models.layers import Layers
from tests.conftest import small_job

KINDS = ("norms", "biases", "embeddings")
GPT = {"num_layers": 2, "width": 16, "num_heads": 2, "context": 8, "vocab_size": 11}
DECAY = 0.25


def gpt_layers(**options: Any) -> Layers:
    """A small GPT."""
    layers, _ = build_model(small_job(model={"name": "gpt", "options": GPT | options}))
    return layers


def job(**changes: Any) -> hybrid.Job:
    """SGD with decay."""
    return small_job(**{"optimizer": {"name": "sgd", "lr": 0.5, "weight_decay": DECAY}} | changes)


def expected_spared(layers: Layers, no_decay: tuple[str, ...]) -> set[str]:
    """By their names, which say what a GPT's parameters are."""
    found = set()
    for name in layers.names().values():
        norm, bias = "norm" in name, name.endswith("bias")
        embedding = name.startswith("0.")
        kinds = {"norms": norm, "biases": bias, "embeddings": embedding}
        if any(kinds[kind] for kind in no_decay):
            found.add(name)
    return found


ALL_KINDS = [kinds for n in range(4) for kinds in itertools.combinations(KINDS, n)]


@pytest.mark.parametrize("no_decay", ALL_KINDS)
def test_spared_are_the_kinds_asked_for(no_decay: tuple[str, ...]) -> None:
    for options in ({}, {"tied": False}, {"positions": "learned"}):
        layers = gpt_layers(**options)
        spared = no_decay_names(layers, no_decay)
        assert spared == expected_spared(layers, no_decay)
        assert "1.attention.qkv.weight" not in spared and "2.up.weight" not in spared


def test_a_tied_embedding_is_spared_as_head_too() -> None:
    tied, untied = gpt_layers(), gpt_layers(tied=False)
    head = tied[-1].logits.weight
    spared = no_decay_names(tied, ["embeddings"])
    assert spared == {"0.token.weight"} == {tied.names()[head]}
    assert no_decay_names(untied, ["embeddings"]) == {"0.token.weight"}
    assert untied.names()[untied[-1].logits.weight] == "3.logits.weight"
    later = Layers([nn.Linear(4, 4), nn.Linear(6, 4, bias=False), nn.Embedding(4, 6)])
    later[1].weight = nn.Parameter(torch.ones(4, 6))
    later[2].weight = later[1].weight
    assert no_decay_names(later, ["embeddings"]) == {"1.weight"}, "of every kind that a place is"


class HouseRMSNorm(nn.Module):
    """A library's own norm, told by the name of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Biased(nn.Module):
    """Biases by other names, and one that only sounds so."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_bias, self.biased = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))


def test_norms_and_biases_of_other_libraries() -> None:
    layers = Layers([HouseRMSNorm(), Biased(), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)])
    norms = {"0.scale", "2.weight", "2.bias", "3.weight", "3.bias"}
    assert no_decay_names(layers, ["norms"]) == norms
    assert no_decay_names(layers, ["biases"]) == {"1.qkv_bias", "2.bias", "3.bias"}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("no_decay", ALL_KINDS)
def test_every_trained_parameter_is_in_one_group(name: str, no_decay: tuple[str, ...]) -> None:
    layers = gpt_layers()
    layers[1].up.bias.requires_grad_(False)
    named = dict(layers.whole().named_parameters())
    spared = no_decay_names(layers, no_decay)
    settings = {"name": name, "lr": 0.5, "weight_decay": DECAY}
    optimizer = build_optimizer(job(optimizer=settings), named, spared)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trained = {p for n, p in named.items() if n != "1.up.bias"}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trained
    assert len(optimizer.param_groups) == (2 if no_decay else 1)
    for group in optimizer.param_groups:
        kept = {n in spared for n, p in named.items() if any(p is q for q in group["params"])}
        assert kept == {group["weight_decay"] == 0.0}
        assert group["lr"] == 0.5


def test_all_may_be_spared() -> None:
    layers = Layers([nn.LayerNorm(4)])
    named = dict(layers.whole().named_parameters())
    optimizer = build_optimizer(job(), named, no_decay_names(layers, ["norms"]))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


def test_a_stage_has_as_many_groups_as_the_whole_model() -> None:
    layers = gpt_layers()
    spared = no_decay_names(layers, ["embeddings"])
    assert count_groups(layers, spared) == 2 and count_groups(layers, ()) == 1
    assert count_groups(layers, set(layers.names().values())) == 1
    middle = dict(layers.join(range(1, 2)).named_parameters())  # a stage without an embedding
    optimizer = build_optimizer(job(), middle, spared, 2)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    grouped = {p for group in optimizer.param_groups for p in group["params"]}
    assert sum(sizes) == len(middle) and grouped == set(middle.values())
    assert len(sizes) == 2 and min(sizes) >= 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, DECAY]
    with pytest.raises(Unsupported, match="one tensor alone"):
        build_optimizer(job(), {"1.up.weight": middle["1.up.weight"]}, spared, 2)


@pytest.mark.parametrize("settings", [{"name": "sgd"}, {"name": "adamw"}])
def test_decay_moves_what_is_not_spared_and_nothing_else(settings: dict[str, Any]) -> None:
    asked = job(optimizer={"lr": 0.5, "weight_decay": DECAY, **settings})
    layers = gpt_layers()
    spared = no_decay_names(layers, KINDS)
    named = dict(layers.whole().named_parameters())
    optimizer = build_optimizer(asked, named, spared)
    before = {}
    for name, parameter in named.items():
        parameter.data += 0.1  # biases start at zero, where decay has nothing to do
        before[name] = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in named.items():
        expected = before[name] if name in spared else before[name] * (1 - 0.5 * DECAY)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)
        assert torch.equal(parameter, before[name]) == (name in spared)


def test_settings_reach_the_optimizer() -> None:
    named = dict(gpt_layers().whole().named_parameters())
    sgd = build_optimizer(job(optimizer={"name": "sgd", "lr": 0.5, "momentum": 0.75}), named, ())
    assert type(sgd) is torch.optim.SGD and sgd.defaults["momentum"] == 0.75
    settings = {"name": "adamw", "lr": 0.5, "betas": [0.75, 0.875], "eps": 1e-3}
    for precision in ("fp32", "bf16", "fp16"):
        asked = job(optimizer=settings, train__precision=precision)
        adamw = build_optimizer(asked, named, ())
        assert type(adamw) is torch.optim.AdamW
        assert adamw.defaults["betas"] == (0.75, 0.875) and adamw.defaults["eps"] == 1e-3
        assert adamw.defaults["fused"] == (precision != "fp16")
        flat = build_optimizer(asked, named, (), flat_ties=True)
        assert not flat.defaults["fused"], "copies of a parameter would drift apart"


@pytest.mark.parametrize("width", [3, 24, 32, 48])
@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_copies_in_flat_buffers_stay_equal_where_places_do_not_matter(
    width: int, num_shares: int
) -> None:
    """One buffer ends with the parameter and the other begins with it, as in two stages."""
    layers = Layers([nn.Linear(width, 5, bias=False), nn.LayerNorm(width)])
    by_place = rounds_by_place(layers, num_shares)
    assert by_place == bool(width % (16 * num_shares))
    draw = torch.Generator().manual_seed(3)
    values, gradients = torch.randn(2, 5 * width, generator=draw)
    found = []
    for before, after in ((0, 7), (2, 0)):
        buffers = [
            torch.cat([torch.ones(before * width), part, torch.ones(after * width)])
            for part in (values, gradients)
        ]
        flat = buffers[0].chunk(num_shares)
        for share, gradient in zip(flat, buffers[1].chunk(num_shares), strict=True):
            share.grad = gradient
        optimizer = torch.optim.AdamW(flat, 0.1, fused=True)
        for _ in range(9):
            optimizer.step()
        found.append(buffers[0][before * width :][: 5 * width])
    assert by_place or torch.equal(*found)


def test_every_group_takes_the_rate_of_the_step() -> None:
    layers = gpt_layers()
    named = dict(layers.whole().named_parameters())
    optimizer = build_optimizer(job(), named, no_decay_names(layers, KINDS))
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert read_learning_rate(optimizer) == 0.125
    optimizer.param_groups[1]["lr"] = 0.25
    with pytest.raises(RunError, match=r"different learning rates: \[0.125, 0.25\]"):
        read_learning_rate(optimizer)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_fp16_nothing_is_scaled(precision: str) -> None:
    scale = LossScale(job(train__precision=precision), torch.device("cpu"))
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.5)
    loss = weight.sum()
    assert scale.value == 1 and scale.scale(loss) is loss
    loss.backward()
    weight.grad[0] = torch.inf  # what is not finite is no overflow: the step is made
    scale.unscale(optimizer)
    scale.step(optimizer)
    assert weight.tolist() == [-torch.inf, 0.5, 0.5]


@pytest.mark.parametrize("strategy", ["single", "local_sgd"])
def test_engines_leave_decay_out_where_the_job_says_so(strategy: str) -> None:
    """Targets that do not count give no gradient: decay alone moves weights."""
    asked = job(
        optimizer={"name": "sgd", "lr": 0.5, "weight_decay": DECAY, "no_decay": ["embeddings"]},
        strategy__local_sgd={"sync_every": 1, "emulate_replicas": 2},
    )
    layers = gpt_layers()
    engine = hybrid.open_engine(asked, strategy, layers, build_model(job())[1])
    before = engine.state()
    ids = torch.arange(8)[None].expand(2, 8)
    ignored = torch.full((2, 8), -100)
    piece = MicroBatch(ids, ignored, torch.tensor([0, 1]))
    engine.train_step([piece, piece])
    after = engine.state()
    assert torch.equal(after["0.token.weight"], before["0.token.weight"])
    expected = before["1.up.weight"] * (1 - 0.5 * DECAY)
    torch.testing.assert_close(after["1.up.weight"], expected, rtol=1e-6, atol=0)
    engine.close()
    cleanup()


@pytest.mark.parametrize(
    "shape", [(500, 700), (65, 384), (30_000, 2), (3, 100_003), (7,), (100_000,), (12, 13, 14)]
)
def test_the_norm_of_any_shape_is_that_in_float64(shape: tuple[int, ...]) -> None:
    from hybrid.engines.optimizer import length

    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    other = torch.full((5,), 0.1)
    whole = torch.cat((numbers.flatten(), other)).double().square().sum().sqrt()
    assert float(length(numbers, other)) == pytest.approx(float(whole), rel=5e-8)
    assert float(length(numbers.T if numbers.dim() == 2 else numbers)) < float(whole)
    assert float(length(torch.empty(0, 64))) == float(length()) == 0
