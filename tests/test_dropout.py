"""Dropout that depends on seed, step, sample and place alone: masks, and masks met again when
activations are computed anew in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.engines.layers import prepare_layers, sample_seeds, set_sample_seeds
from hybrid.models import build_model
from hybrid.models.dropout import Dropout, mix, number_dropouts, rows_in_use, use_rows
from hybrid.models.layers import Layers
from hybrid.models.losses import cross_entropy
from tests.conftest import small_job

Draws = Callable[[Any, torch.nn.Module, torch.Tensor, int, int], torch.Tensor]


@pytest.fixture(autouse=True)
def no_rows_left() -> Iterator[None]:
    """`draw` sets rows without an end: they end with the test."""
    with use_rows(None):
        yield


GPT = {"num_layers": 2, "width": 16, "num_heads": 2, "context": 8, "vocab_size": 11, "dropout": 0.3}


def masks(seeds: list[int | None], place: int = 0, p: float = 0.3) -> Any:
    """What a dropout multiplies [rows, 6, 50] by."""
    layer = Dropout(p)
    layer.place = place
    with use_rows(seeds):
        return layer(torch.ones(len(seeds), 6, 50))


# --- masks ---


def test_a_row_has_the_same_mask_whatever_the_batch() -> None:
    whole = masks([4, 5, 6, 7])
    assert torch.equal(masks([7, 4, 6, 5]), whole[[3, 0, 2, 1]])
    assert torch.equal(torch.cat([masks([4]), masks([5, 6, 7])]), whole)
    torch.manual_seed(99)  # torch's own stream has no part in it
    assert torch.equal(masks([4, 5, 6, 7]), whole)


def test_another_seed_or_place_is_another_mask() -> None:
    rows = [*masks([4, 5, 6]), *masks([4, 5, 6], place=1), *masks([4, 5, 6], place=2)]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            # Of two masks that know nothing of each other 0.7^2 + 0.3^2 of the units agree.
            assert 0.4 < float((row == other).float().mean()) < 0.76


def test_a_forward_pass_is_seeded_by_seed_step_sample_and_nothing_else() -> None:
    def seen(seed: int, step: int, sample: int, place: tuple[int, ...] = (0, 0, 0)) -> Any:
        with sample_seeds(small_job(train__seed=seed), step, place, torch.tensor([3, sample]), 2):
            return tuple(rows_in_use() or ())

    first = seen(1, 2, 4)
    assert first == (mix(1, 2, 3), mix(1, 2, 4))
    assert seen(1, 2, 4, (1, 5, 2)) == first, "other ranks and micro-batches draw the same"
    assert len({row for args in [(1, 2, 4), (2, 1, 4), (1, 4, 2)] for row in seen(*args)}) == 6
    assert rows_in_use() is None, "the seeds stay when the pass is over"


def test_mixed_seeds_differ() -> None:
    numbers = [(a, b, c) for a in range(12) for b in range(12) for c in range(-3, 12)]
    assert len({mix(*n) for n in numbers}) == len(numbers)
    assert mix(0) != mix(0, 0)
    assert all(0 <= mix(*n) < 2**63 for n in [(2**63 - 1,), (0,), (-5, 2**62)])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_units_are_kept_at_the_rate_and_the_mean_stays(p: float) -> None:
    mask = masks(list(range(400)), p=p)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    share = float((mask > 0).double().mean())
    assert share == pytest.approx(1 - p, abs=5 * (p * (1 - p) / mask.numel()) ** 0.5)
    assert float(mask.double().mean()) == pytest.approx(1, abs=0.01)
    kept_by_unit = (mask > 0).double().mean(0)
    assert float((kept_by_unit - (1 - p)).abs().max()) < 0.15, "some units are dropped more often"


def test_padding_rows_are_left_as_they_are() -> None:
    padded = masks([4, 5, None, None, None])
    assert torch.equal(padded[:2], masks([4, 5]))
    assert torch.equal(padded[2:], torch.ones(3, 6, 50))
    assert torch.equal(masks([None, None]), torch.ones(2, 6, 50))


def test_lines_of_a_row_are_dropped_as_the_row_is() -> None:
    with use_rows([4, None, 6]):
        laid_out = Dropout(0.3)(torch.ones(3 * 6, 50))
        odd = Dropout(0.3)(torch.ones(7, 50))
    assert torch.equal(laid_out.view(3, 6, 50), masks([4, None, 6]))
    assert 0.5 < float((odd > 0).float().mean()) < 0.9, "rows of something else are dropped too"


def test_a_padded_micro_batch_has_seeds_for_its_samples_alone() -> None:
    with sample_seeds(small_job(), 2, (0, 0, 0), torch.tensor([3, 4]), 5):
        assert tuple(rows_in_use() or ()) == (mix(0, 2, 3), mix(0, 2, 4), None, None, None)


def test_every_precision_drops_the_same_units() -> None:
    x, layer = torch.ones(2, 300), Dropout(0.3)
    with use_rows([4, 5]):
        wide, low = layer(x), layer(x.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.equal(low == 0, wide == 0)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero() -> None:
    x = torch.randn(2, 30)
    with use_rows([4, 5]):
        assert Dropout(0.5).eval()(x) is x and Dropout(0.0)(x) is x


def test_without_rows_it_is_torchs_own() -> None:
    x = torch.ones(2, 300)
    torch.manual_seed(1)
    mine = Dropout(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(mine, nn.Dropout(0.3)(x))


# --- places ---


def test_places_count_through_the_whole_model() -> None:
    layers, _ = build_model(small_job(model={"name": "gpt", "options": GPT}))
    found = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Dropout)]
    number_dropouts(layers)
    assert [m.place for m in found] == [0, 1, 2, 3, 4]


def test_a_users_own_dropouts_are_taken_in_and_a_shared_one_counts_once() -> None:
    shared = nn.Dropout(0.2)
    layers = [nn.Sequential(nn.Dropout(0.2), shared), nn.Sequential(shared, nn.Dropout(0.0))]
    number_dropouts(layers)
    (first, _), (second, last) = layers
    assert second is shared and type(shared) is type(first) is type(last) is Dropout
    assert (first.place, shared.place, last.place) == (0, 1, 2)
    with use_rows([4, 5]):
        once, again = (layers[0](torch.ones(2, 300)) for _ in range(2))
    assert torch.equal(once, again)


class Flat(nn.Module):
    """Drops over tokens laid in one row each, as mixtures of experts do; notes how many."""

    shares: list[list[float]] = []  # noqa: RUF012 (of the class: the engine has the model)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(61, 50), nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [batch, tokens] to [batch, tokens, 50]."""
        rows = self.dropout(torch.ones(ids.numel(), 50))
        if self.training:
            self.shares.append((rows == 0).float().mean(1).tolist())
        return self.embedding(ids) * rows.view(*ids.shape, 50)


def flat() -> tuple[list[nn.Module], Any]:
    """A model whose dropout sees batch * tokens rows."""
    return [Flat(), nn.Linear(50, 61)], cross_entropy


def test_rows_that_are_not_samples_are_dropped_too() -> None:
    Flat.shares.clear()
    job = hybrid.load_job(
        {
            "model": {"name": "tests.test_dropout:flat"},
            "data": {"name": "tests.workloads:sentences"},
            "optimizer": {"name": "sgd", "lr": 0.1},
            "train": {"global_batch": 4, "steps": 1},
        }
    )
    hybrid.train(job, "single")
    *_, shares = Flat.shares  # before the step, the check of the job ran the layers too
    assert len(shares) == 4 * 16 and min(shares) > 0.1 and max(shares) < 0.9


# --- activations computed again ---


def checkpointed(on: bool) -> tuple[Any, nn.Module]:
    """The GPT as engines take it, with or without recomputation."""
    changes = {"train__activation_checkpointing": on, "train__seed": 7}
    job = small_job(model={"name": "gpt", "options": GPT}, **changes)
    layers, _ = build_model(job)
    return job, prepare_layers(job, layers).whole().train()


def by_context(job: Any, model: nn.Module, ids: torch.Tensor, step: int, k: int) -> torch.Tensor:
    """A forward pass of an engine that calls the model itself."""
    with sample_seeds(job, step, (0, k, 0), ids, len(ids)):
        return model(ids[:, None].expand(-1, 8) % 11)


def by_setting(job: Any, model: nn.Module, ids: torch.Tensor, step: int, k: int) -> torch.Tensor:
    """A forward pass of an engine that is called back, as in a pipeline."""
    set_sample_seeds(job, step, (0, k, 0), ids, len(ids))
    return model(ids[:, None].expand(-1, 8) % 11)


def gradients(on: bool, forward: Draws, step: int = 3) -> dict[str, torch.Tensor]:
    """Of two micro-batches, both forward before the first backward."""
    job, model = checkpointed(on)
    first = forward(job, model, torch.tensor([4, 5, 6]), step, 0)
    second = forward(job, model, torch.tensor([7, 8]), step, 1)
    first.square().sum().backward()
    second.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("forward", [by_context, by_setting])
def test_recomputed_activations_meet_the_mask_they_had(forward: Draws) -> None:
    kept, again = gradients(False, forward), gradients(True, forward)
    assert kept.keys() == again.keys() and len(kept) == 25
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name
    other = gradients(True, forward, step=4)
    assert not torch.equal(other["1.up.weight"], kept["1.up.weight"]), "nothing was dropped"


def test_checkpointing_recomputes_each_block_once_and_keeps_names() -> None:
    calls = []
    job, model = checkpointed(True)
    _, plain = checkpointed(False)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [type(x).__name__ for x in model] == ["Embedding", "Block", "Block", "Head"]
    for i in (1, 2):
        model[i].norm1.register_forward_hook(lambda *_, i=i: calls.append(i))
    out = by_context(job, model, torch.tensor([4, 5]), 0, 0)
    assert calls == [1, 2]
    out.sum().backward()
    assert calls == [1, 2, 2, 1]
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64))
    assert calls[4:] == [1, 2]


class Functional(nn.Module):
    """Draws noise from torch's own stream."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n] to the same, some of it dropped."""
        return x * torch.bernoulli(torch.full_like(x, 0.5))


def test_what_else_draws_is_the_same_in_two_runs_of_a_layout() -> None:
    def drawn(step: int, place: tuple[int, ...], recompute: bool = False) -> torch.Tensor:
        job = small_job(train__activation_checkpointing=recompute)
        layers = prepare_layers(job, Layers([Functional()]))
        x = torch.ones(50, requires_grad=True)
        with sample_seeds(job, step, place, torch.tensor([1]), 1):
            y = layers.whole().train()(x)
        torch.manual_seed(0)
        y.sum().backward()
        assert x.grad is not None and torch.equal(x.grad, y.detach())
        return x.grad

    first = drawn(2, (0, 1, 0))
    assert torch.equal(drawn(2, (0, 1, 0)), first)
    assert torch.equal(drawn(2, (0, 1, 0), recompute=True), first)
    for step, place in [(3, (0, 1, 0)), (2, (1, 1, 0)), (2, (0, 2, 0)), (2, (0, 1, 1))]:
        assert not torch.equal(drawn(step, place), first), (step, place)
