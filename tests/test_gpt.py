"""The GPT: its sizes, its causality and positions, and the same logits as one written out by hand.

The one by hand uses no module of the package: softmax(QK^T / sqrt(d)) V under a mask, rotations as
products of complex numbers, norms and GELU by their formulas, all in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from hybrid.job.errors import JobError
from hybrid.models import build_model
from hybrid.models.gpt import Attention, gpt
from hybrid.models.losses import cross_entropy
from hybrid.models.presets import PRESETS
from tests.conftest import small_job

SIZES: dict[str, Any] = dict(num_layers=2, width=24, num_heads=3, context=10, vocab_size=19)


def build(**options: Any) -> tuple[Any, Any]:
    """The model as a job makes it."""
    seed = options.pop("seed", 0)
    named = {"name": "gpt", "options": SIZES | options}
    return build_model(small_job(model=named, train__seed=seed))


def lively(**options: Any) -> nn.Module:
    """A small GPT in float64 whose weights are large: no score, bias or slope is lost in others."""
    layers, _ = build(**options)
    model = layers.whole().double()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    """Random ids int64 [rows, length]."""
    draw = torch.Generator().manual_seed(5)
    return torch.randint(SIZES["vocab_size"], (rows, length), generator=draw)


def count(layers: Any) -> int:
    """Parameters, a tied one once."""
    return sum(p.numel() for p in layers.names())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_about_the_parameters_of_its_name(preset: str) -> None:
    number, unit = re.fullmatch(r"([\d.]+)([mbt])", preset).groups()  # type: ignore[union-attr]
    named = float(number) * {"m": 1e6, "b": 1e9, "t": 1e12}[unit]
    with torch.device("meta"):
        layers, _ = gpt(preset)
    num_layers, width, _, _, vocabulary = PRESETS[preset]
    # A block: 3 + 1 + 4 + 4 matrices of width x width, two norms, biases of out, up and down.
    by_hand = num_layers * (12 * width**2 + 10 * width) + 2 * width + vocabulary * width
    assert count(layers) == by_hand
    # Llama 2's 70b has a gated network, which ours has not.
    assert abs(by_hand / named - 1) < (0.1 if preset in ("10m", "70b") else 0.03)
    assert len(layers) == num_layers + 2
    assert all(p.is_meta for p in layers.names())


def test_the_124m_preset_is_gpt2_but_for_the_biases_of_queries_keys_and_values() -> None:
    with torch.device("meta"):
        layers, _ = gpt("124m", positions="learned")
    num_layers, width, num_heads, context, vocabulary = PRESETS["124m"]
    assert (num_layers, width, num_heads, context, vocabulary) == (12, 768, 12, 1024, 50257)
    assert count(layers) == 124_439_808 - num_layers * 3 * width == 124_412_160


def test_an_argument_overrides_its_part_of_a_preset() -> None:
    with torch.device("meta"):
        layers, _ = gpt("10m", num_layers=2, vocab_size=100)
        whole, _ = gpt("10m")
    width = PRESETS["10m"][1]
    blocks, rows = PRESETS["10m"][0] - 2, PRESETS["10m"][4] - 100
    assert count(whole) - count(layers) == blocks * (12 * width**2 + 10 * width) + rows * width
    assert len(layers) == 4


def test_untied_and_learned_positions_add_their_tables() -> None:
    (tied, _), (untied, _) = build(), build(tied=False)
    assert count(untied) - count(tied) == SIZES["vocab_size"] * SIZES["width"]
    assert tied[-1].logits.weight is tied[0].token.weight
    assert untied[-1].logits.weight is not untied[0].token.weight
    assert sum(tied.sizes()) == sum(untied.sizes()) == count(untied)
    learned, _ = build(positions="learned")
    assert count(learned) - count(tied) == SIZES["context"] * SIZES["width"]
    assert "0.position.weight" in learned.tensors() and "0.position.weight" not in tied.tensors()


def test_rotary_tables_are_buffers_in_fp32() -> None:
    layers, _ = build()
    buffers = {n: t for n, t in layers.tensors().items() if not isinstance(t, nn.Parameter)}
    assert list(buffers) == [f"{i}.attention.inverse_frequency" for i in (1, 2)]
    half = SIZES["width"] // SIZES["num_heads"] // 2
    expected = torch.tensor([10_000 ** (-i / half) for i in range(half)])
    for table in buffers.values():
        torch.testing.assert_close(table, expected)


def test_weights_start_as_gpt2s_and_follow_from_the_seed() -> None:
    sizes = {"num_layers": 8, "width": 96, "tied": False}
    (first, loss), (again, _), (other, _) = (build(seed=s, **sizes) for s in (7, 7, 8))
    assert loss is cross_entropy
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name])
        if name.endswith("bias"):
            assert not tensor.any(), name
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones(96)), name
        elif isinstance(tensor, nn.Parameter):
            assert not torch.equal(tensor, other.tensors()[name])
            adds = name.endswith(("attention.out.weight", "down.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if adds else 0.02
            assert float(tensor.detach().std()) == pytest.approx(expected, rel=0.1), name


def test_a_fresh_model_predicts_evenly_and_counts_every_target() -> None:
    layers, loss = build()
    ids = tokens(4, 10)
    target = (ids + 1) % SIZES["vocab_size"]  # a tied head leans to the token itself
    target[0, :3] = -100
    total, counted = loss(layers.whole()(ids), target)
    assert int(counted) == 37
    assert float(total.detach()) / 37 == pytest.approx(math.log(SIZES["vocab_size"]), rel=0.02)


def test_it_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        layers, _ = build(positions="learned", dropout=0.1)
        out = layers.whole()(torch.zeros(2, 7, dtype=torch.int64))
    assert out.is_meta and out.shape == (2, 7, SIZES["vocab_size"])


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_later_token_changes_no_earlier_logits(positions: str) -> None:
    model = lively(positions=positions)
    ids = tokens(2, 10)
    before = model(ids)
    for at in range(10):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % SIZES["vocab_size"]
        after = model(changed)
        assert torch.equal(after[:, :at], before[:, :at]), at
        assert (after[:, at:] - before[:, at:]).abs().amax((0, 2)).min() > 1e-4, at


def scores_of_equal_rows(monkeypatch: pytest.MonkeyPatch, rotary: bool) -> torch.Tensor:
    """What each query of one attention scores each key, [heads, T, T], where all tokens are the
    same vector, so that positions alone make a difference."""
    seen = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any) -> torch.Tensor:
        seen.append(q @ k.transpose(-2, -1))
        return v

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    torch.manual_seed(0)
    attention = Attention(24, 3, rotary).double()
    attention(torch.randn(24, dtype=torch.float64).expand(1, 12, 24))
    return seen[0][0]


def test_rotary_scores_depend_on_the_distance_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = scores_of_equal_rows(monkeypatch, rotary=True)
    torch.testing.assert_close(scores[:, 1:, 1:], scores[:, :-1, :-1])
    by_distance = scores[:, -1]
    assert (by_distance - by_distance[:, :1]).abs()[:, 1:].min() > 1e-4, "no position is told apart"
    plain = scores_of_equal_rows(monkeypatch, rotary=False)
    torch.testing.assert_close(plain, plain[:, :1, :1].expand_as(plain))
    torch.testing.assert_close(scores.diagonal(dim1=1, dim2=2)[:, 0], plain[:, 0, 0])


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_more_tokens_than_the_context_are_refused_fewer_are_not(positions: str) -> None:
    model = lively(positions=positions)
    assert model(tokens(1, 10)).shape == (1, 10, SIZES["vocab_size"])
    assert model(tokens(1, 1)).shape == (1, 1, SIZES["vocab_size"])
    with pytest.raises(ValueError, match=r"context = 10: .* 11 tokens"):
        model(tokens(1, 11))


def norm_by_hand(x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    normed = (x - mean) / (variance + 1e-5).sqrt()
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rotate_by_hand(x: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, head width]: entries i and i + half are a complex number, turned by
    position * 10,000^(-i / half)."""
    half = x.shape[-1] // 2
    rates = torch.tensor([10_000 ** (-i / half) for i in range(half)], dtype=torch.float64)
    turns = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), rates)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * turns)
    return torch.cat((turned.real, turned.imag), -1)


def attend_by_hand(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str, rotary: bool
) -> torch.Tensor:
    """One head after another."""
    width, size = x.shape[-1], x.shape[-1] // SIZES["num_heads"]
    allowed = torch.arange(x.shape[1])[:, None] >= torch.arange(x.shape[1])
    mixed = []
    for head in range(SIZES["num_heads"]):
        q, k, v = (
            x @ weights[f"{name}.qkv.weight"][part * width + head * size :][:size].T
            for part in range(3)
        )
        if rotary:
            q, k = rotate_by_hand(q), rotate_by_hand(k)
        scores = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(size)
        powers = (scores - scores.amax(-1, keepdim=True)).exp() * allowed
        mixed.append(powers / powers.sum(-1, keepdim=True) @ v)
    out = weights[f"{name}.out.weight"], weights[f"{name}.out.bias"]
    return torch.cat(mixed, -1) @ out[0].T + out[1]


def logits_by_hand(ids: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    x = weights["0.token.weight"][ids]
    learned = weights.get("0.position.weight")
    if learned is not None:
        x = x + learned[: ids.shape[1]]
    for i in range(1, SIZES["num_layers"] + 1):
        normed = norm_by_hand(x, weights, f"{i}.norm1")
        x = x + attend_by_hand(normed, weights, f"{i}.attention", learned is None)
        normed = norm_by_hand(x, weights, f"{i}.norm2")
        up = normed @ weights[f"{i}.up.weight"].T + weights[f"{i}.up.bias"]
        active = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        x = x + active @ weights[f"{i}.down.weight"].T + weights[f"{i}.down.bias"]
    last = SIZES["num_layers"] + 1
    head = weights.get(f"{last}.logits.weight", weights["0.token.weight"])
    return norm_by_hand(x, weights, f"{last}.norm") @ head.T


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_written_out_by_hand(positions: str, tied: bool) -> None:
    model = lively(positions=positions, tied=tied)
    ids = tokens(3, 10)
    with torch.no_grad():
        expected = logits_by_hand(ids, dict(model.named_parameters()))
        away = (model(ids) - expected).abs().max() / expected.abs().max()
        assert away < 1e-6
        single = (model.float()(ids) - expected).abs().max() / expected.abs().max()
        assert single < 1e-5, "in fp32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "7b"}, "preset = '7b': valid: 1m, 10m"),
        ({"num_layers": None}, "num_layers is missing; give it, or a preset: 1m, 10m"),
        ({"width": None}, "width is missing"),
        ({"num_heads": None}, "num_heads is missing"),
        ({"num_layers": 0}, "num_layers = 0: a whole number, 1 or more, is needed"),
        ({"width": -24}, "width = -24: a whole number"),
        ({"width": 24.0}, "width = 24.0: a whole number"),
        ({"num_heads": "3"}, "num_heads = '3': a whole number"),
        ({"context": 0}, "context = 0: a whole number"),
        ({"vocab_size": True}, "vocab_size = True: a whole number"),
        ({"num_heads": 5}, "num_heads = 5: does not divide width = 24"),
        ({"num_heads": 8}, "num_heads = 8: does not divide width = 24 into even parts"),
        ({"positions": "alibi"}, "positions = 'alibi': valid: rope, learned"),
        ({"dropout": 1.0}, "dropout = 1.0: valid: 0 up to, not including, 1"),
        ({"dropout": -0.1}, "dropout = -0.1: valid"),
        ({"dropout": "0.1"}, "dropout = '0.1': valid"),
        ({"tied": "no"}, "tied = 'no': valid"),
        ({"layers": 3}, "valid: preset, num_layers, width, num_heads, context, vocab_size, tied"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(options: dict[str, Any], said: str) -> None:
    chosen = {k: v for k, v in (SIZES | options).items() if v is not None}
    with pytest.raises(JobError) as refused:
        build_model(small_job(model={"name": "gpt", "options": chosen}))
    text = str(refused.value)
    assert said in text and "\n" not in text and text.startswith("model.options")


def test_odd_heads_are_fine_where_nothing_is_rotated() -> None:
    layers, _ = build(num_heads=8, positions="learned")
    assert layers.whole()(tokens(1, 4)).shape == (1, 4, SIZES["vocab_size"])
