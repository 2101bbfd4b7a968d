"""Dropout by torch's functions: masks by sample and place, attention by its formula, and hooks that
leave the modules which draw nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _is_torch_function_mode_enabled as mode_is_on

from hybrid.engines.layers import (
    asks_for_rows,
    prepare_layers,
    sample_seeds,
    seed_forward_pass,
)
from hybrid.models.attention import attention_weights
from hybrid.models.draws import draws_by_functions, forward_pass, seed_functions
from hybrid.models.dropout import number_dropouts, use_rows
from hybrid.models.layers import Layers
from hybrid.training.tryout.watch import find_draws
from tests.conftest import small_job

Call = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def nothing_in_force() -> Iterator[None]:
    """No test leaves a mode behind."""
    yield
    assert not mode_is_on()


class Calls(nn.Module):
    """Calls a function in its forward pass, as users do."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Whatever the function makes of it."""
        return self.call(x)


def attend(x: torch.Tensor, **options: Any) -> torch.Tensor:
    """[rows, 5, 6] by two heads, a third of the weights dropped."""
    heads = x.view(len(x), 5, 2, 3).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3, **options)


def multi_head(need_weights: bool) -> nn.Module:
    """torch's attention over [rows, 5, 6], as a module of one argument."""
    attention = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=need_weights)[0]

    return Attends()


def draw_inside(x: torch.Tensor) -> torch.Tensor:
    """In place, by the operator behind the function."""
    return torch.dropout_(x.clone(), 0.3, True)


DRAWN: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: Calls(lambda x: F.dropout(x, 0.3)),
    "by keyword": lambda: Calls(lambda x: F.dropout(input=x, p=0.3, training=True, inplace=False)),
    "in place": lambda: Calls(lambda x: F.dropout(x.clone(), 0.3, inplace=True)),
    "operator": lambda: Calls(lambda x: torch.dropout(x, 0.3, train=True)),
    "operator in place": lambda: Calls(draw_inside),
    "dropout1d": lambda: Calls(lambda x: F.dropout1d(x, 0.3)),
    "dropout2d": lambda: Calls(lambda x: F.dropout2d(x[..., None], 0.3)),
    "nn.Dropout3d": lambda: nn.Sequential(nn.Unflatten(2, (2, 3, 1)), nn.Dropout3d(0.3)),
    "nn.AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "nn.FeatureAlphaDropout": lambda: nn.FeatureAlphaDropout(0.3),
    "attention": lambda: Calls(attend),
    "nn.MultiheadAttention": lambda: multi_head(need_weights=False),
    "its weights": lambda: multi_head(need_weights=True),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 7, 0.3, batch_first=True),
    "heads folded in": lambda: Calls(
        lambda x: F.dropout(x.view(-1, 5, 2, 3).transpose(1, 2).reshape(-1, 5, 3), 0.3)
    ),
}


def prepared(module: nn.Module) -> nn.Module:
    """A module in which functions draw by sample."""
    modules = list(module.modules())
    number_dropouts([module])
    seed_functions(modules)
    return module.train()


@pytest.mark.parametrize("name", DRAWN)
def test_a_sample_is_dropped_alike_whatever_the_batch(name: str) -> None:
    torch.manual_seed(3)
    module, x = prepared(DRAWN[name]()), torch.randn(7, 5, 6)

    def run(seeds: list[int | None], rows: list[int]) -> torch.Tensor:
        with use_rows(seeds):
            out = module(x[rows])
        return out.reshape(len(rows), -1)

    whole = run([1, 2, 3, 4, 5, 6, 7], list(range(7)))
    torch.manual_seed(99)  # torch's own stream has no part in it
    torch.testing.assert_close(run([4, 5, 2], [3, 4, 1]), whole[[3, 4, 1]])
    torch.testing.assert_close(run([7, None, None], [6, 0, 0])[:1], whole[6:])
    assert not torch.allclose(run([11, 12], [0, 1]), whole[:2]), "nothing was dropped"


@pytest.mark.parametrize("tokens", [12, 4, 2])
def test_modules_that_put_tokens_first_are_dropped_by_sample(tokens: int) -> None:
    module = prepared(nn.TransformerEncoderLayer(6, 2, 7, 0.3))
    torch.manual_seed(3)
    x = torch.randn(tokens, 4, 6)
    with use_rows([1, 2, 3, 4]):
        whole = module(x)
    with use_rows([3, 4]):
        torch.testing.assert_close(module(x[:, 2:]), whole[:, 2:])
        assert torch.equal(module.eval()(x), module(x)), "evaluation drops"


@pytest.mark.parametrize("p", [0.2, 1.0])
def test_masks_are_those_of_torch_in_kind(p: float) -> None:
    """Kept at the rate, with the values that torch's own functions give."""
    for function in (F.dropout, F.alpha_dropout, F.dropout1d, F.feature_alpha_dropout):
        module = prepared(Calls(lambda x, function=function: function(x, p, True)))
        x = torch.ones(40, 50, 10)
        with use_rows(list(range(40))):
            mine = module(x)
        theirs = function(x, p, True)
        torch.testing.assert_close(mine.unique(), theirs.unique())
        assert float((mine - theirs).mean().abs()) < 0.05, function


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"is_causal": True, "scale": 0.7},
    "bool": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril(-1)},  # the first query: no key
    "float": {"attn_mask": torch.linspace(-3, 3, 25).view(5, 5)},
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_is_that_of_torch_but_for_what_is_dropped(name: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 4, requires_grad=True) for _ in range(3))
    options = {"attn_mask": None, "is_causal": False, "scale": None} | MASKS[name]
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    mask = options.pop("attn_mask")
    mine = attention_weights(q, k, mask, **options) @ v
    torch.testing.assert_close(mine, expected)
    gradients = [torch.autograd.grad(y.sum(), (q, k, v)) for y in (mine, expected)]
    torch.testing.assert_close(*gradients)


def test_groups_of_heads_share_keys() -> None:
    def grouped(x: torch.Tensor) -> torch.Tensor:
        q, k = x.view(-1, 6, 5, 1), x[:, :, :2].reshape(-1, 2, 5, 1)
        return F.scaled_dot_product_attention(q, k, k, dropout_p=1e-9, enable_gqa=True)

    x = torch.randn(3, 5, 6)
    with use_rows([1, 2, 3]):
        torch.testing.assert_close(prepared(Calls(grouped))(x), Calls(grouped)(x))


# --- places ---


class Twice(nn.Module):
    """Draws twice by itself, and once in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Calls(lambda x: F.dropout(x, 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, ...] to three of that."""
        return torch.stack([F.dropout(x, 0.5), self.inner(x), F.dropout(x, 0.5)])


def test_each_call_has_a_place_of_its_own_that_stays() -> None:
    module = prepared(nn.Sequential(Twice(), nn.Identity()))
    with use_rows([1, 2]):
        first, second, third = module(torch.ones(2, 300))
        again = module(torch.ones(2, 300))
        # A stage of a pipeline runs a part of the modules.
        alone = module[0].inner(torch.ones(2, 300))
    assert torch.equal(again, torch.stack([first, second, third])) and torch.equal(alone, second)
    assert not any(torch.equal(a, b) for a, b in ((first, second), (first, third), (second, third)))


def test_hooks_stay_where_something_draws_and_nowhere_else() -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.0) + F.dropout(x, 0.0)

    layers = nn.Sequential(Calls(plain), Twice(), nn.Linear(6, 6))
    prepared(layers)
    with use_rows([1, 2]):
        layers(torch.ones(2, 5, 6))
        layers(torch.ones(2, 5, 6))
    assert [draws_by_functions(m) for m in layers] == [False, True, False]
    assert draws_by_functions(layers[1].inner) and not draws_by_functions(layers)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in layers]
    assert hooks == [0, 2, 0] and not layers._forward_hooks


def test_a_pass_that_an_exception_leaves_is_over() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("left")

    module = prepared(nn.Sequential(nn.Sequential(Calls(fail))))
    with use_rows([1]), pytest.raises(ValueError, match="left"):
        module(torch.ones(1, 3))
    assert not mode_is_on()
    with pytest.raises(KeyError), forward_pass(module.train()):
        raise KeyError
    assert not mode_is_on()


def test_recomputed_activations_meet_the_draws_they_had() -> None:
    def gradient(recompute: bool) -> torch.Tensor:
        job = small_job(train__activation_checkpointing=recompute)
        torch.manual_seed(2)
        block = nn.Sequential(nn.Linear(6, 6), Calls(attend))
        layers = prepare_layers(job, Layers([Calls(lambda x: F.dropout(x, 0.4)), block]))
        model, found = layers.whole().train(), []
        for step in range(2):  # by the second one the hooks are gone from what does not draw
            x = torch.linspace(-1, 1, 90).view(3, 5, 6).clone().requires_grad_()
            with sample_seeds(job, step, (0, 0, 0), torch.tensor([4, 5, 6]), 3):
                y = model(x)
            y.square().sum().backward()
            found.append(x.grad)
        return torch.stack(found)  # type: ignore[arg-type]

    assert torch.equal(gradient(True), gradient(False))


def test_what_draws_by_itself_is_named() -> None:
    def noise(x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)

    model = nn.Sequential(nn.Dropout(0.5), Twice(), nn.Sequential(nn.RReLU(), Calls(noise)))
    prepared(model)
    with use_rows([1, 2]):
        found = find_draws(model, lambda: model(torch.ones(2, 6)))
    assert [name for name, _ in found] == ["2.0", "2.1"]
    with use_rows(None):
        found = find_draws(model, lambda: model(torch.ones(2, 6)))
    assert "0" in [name for name, _ in found]


def test_rows_are_seeded_for_models_that_ask_for_them_alone() -> None:
    drops = Calls(lambda x: F.dropout(x, 0.5))
    for layer, asks in (
        (nn.ReLU(), False),
        (nn.Dropout(0.5), True),
        (drops, True),
        (nn.BatchNorm1d(8), True),
    ):
        model = prepare_layers(small_job(), Layers([nn.Linear(8, 8), layer])).whole()
        model(torch.ones(4, 8))
        assert asks_for_rows(model) == asks, layer


def test_no_two_forward_passes_of_a_run_draw_alike() -> None:
    """Small numbers are what seeds, steps, shares, micro-batches and stages are."""
    found = set()
    for numbers in itertools.product(range(5), range(20), range(6), range(5), range(4)):
        seed_forward_pass(*numbers)
        found.add(torch.initial_seed())
    assert len(found) == 5 * 20 * 6 * 5 * 4
