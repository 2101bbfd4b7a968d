"""Modules that people bring are cut into stages which compute what the module computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import TensorDataset

from hybrid.data.loader import load_micro_batch
from hybrid.engines.layers import prepare_layers, sample_seeds
from hybrid.engines.pipeline_stage import make_contiguous
from hybrid.models.brought import as_layers
from hybrid.models.cutting.calling import logits_of, spread
from tests import brought_models as brought
from tests.conftest import small_job
from tests.test_hf import sum_gradients

SETS: dict[str, Callable[[], Any]] = {
    "bert": brought.masked_sentences,
    "vit": brought.images,
    "nanogpt": brought.tokens,
    "alexnet": lambda: brought.images(side=35),
    "resnet": brought.images,
}
NUM_ELEMENTS = {"bert": 7, "vit": 8, "nanogpt": 7, "alexnet": 17, "resnet": 8}


def cut(model: nn.Module, samples: Sequence[Any]) -> Any:
    layers = as_layers(model)
    layers.cut(samples)
    return layers


def make(name: str, **options: Any) -> tuple[Any, Any]:
    """Layers of one of the models, cut, and its train set."""
    torch.manual_seed(3)
    samples = SETS[name]()[0]
    return cut(getattr(brought, name)(**options)[0], samples), samples


def stages_of(layers: Any, *bounds: int) -> list[Any]:
    ends = itertools.pairwise((0, *bounds, len(layers)))
    return [copy.deepcopy(layers).join(range(a, b)) for a, b in ends]


def run(stages: list[Any], value: Any, ids: torch.Tensor) -> tuple[Any, dict[str, Any]]:
    """Output of stages in one process, and gradients by name, those of shared weights summed."""
    received: list[torch.Tensor] = []
    sent: list[torch.Tensor] = []
    for stage in stages:
        if hasattr(stage, "stage_inputs"):
            stage.stage_inputs = value
        given = sent[-1].detach().requires_grad_() if sent else torch.zeros(1)
        received.append(given)
        whole = not hasattr(stage, "stage_inputs")
        with sample_seeds(small_job(), 1, (0, 0, 0), ids, len(ids)):  # each stage draws as it does
            sent.append(stage(value if whole else given.clone()))
    sent[-1].square().sum().backward()
    for given, output in zip(received[:0:-1], sent[-2::-1], strict=True):
        output.backward(given.grad)
    return sent[-1].detach(), sum_gradients(stages)


@pytest.mark.parametrize(
    ("name", "recomputed"), [*((name, False) for name in SETS), ("bert", True), ("alexnet", True)]
)
def test_stages_compute_what_the_module_computes(name: str, recomputed: bool) -> None:
    layers, samples = make(name)
    assert layers.cut_problem is None and len(layers) == NUM_ELEMENTS[name]
    prepare_layers(small_job(train__activation_checkpointing=recomputed), layers)
    batch = load_micro_batch(samples, [3, 7, 4])
    expected, wanted = run([copy.deepcopy(layers).whole()], batch.input, batch.ids)
    n = len(layers)
    for bounds in ((2, 4), (n - 1,), tuple(range(2, n))):
        stages = stages_of(layers, *bounds)
        output, gradients = run(stages, batch.input, batch.ids)
        assert torch.equal(output, expected) and gradients.keys() == wanted.keys()
        for key, gradient in wanted.items():
            off = (gradients[key] - gradient).norm() / gradient.norm().clamp_min(1e-6)
            assert off < 1e-5, key


def test_a_mask_that_does_not_reach_a_stage_is_seen() -> None:
    layers, samples = make("bert")
    prepare_layers(small_job(), layers)
    batch = load_micro_batch(samples, [0, 1, 2])
    first, second = stages_of(layers, 3)
    first.stage_inputs = batch.input
    hidden = first(torch.zeros(1))
    second.stage_inputs = batch.input
    right = second(hidden)
    second.stage_inputs = {"input_ids": batch.input["input_ids"]}
    assert not torch.allclose(second(hidden), right)


def test_each_stage_keeps_what_it_trains_and_its_own_buffers() -> None:
    layers, _ = make("resnet")
    owners = layers.buffer_owners()
    assert {n for n, i in owners.items() if i == 0} == set(owners)
    assert set(owners) == {f"bn1.{n}" for n in ("running_mean", "running_var")} | {
        "bn1.num_batches_tracked"
    }
    first, second = stages_of(layers, 3)
    names = [{n for n, _ in stage.named_parameters()} for stage in (first, second)]
    whole = dict(layers.model.named_parameters())
    assert names[0] | names[1] == set(whole) and not names[0] & names[1]
    assert sum(layers.sizes()) == sum(p.numel() for p in whole.values())
    assert "layer1.1.bn1.running_mean" in dict(first.named_buffers())
    assert "layer1.1.bn1.running_mean" not in dict(second.named_buffers())


class Chain(nn.Module):
    """Four blocks of a user's own, run by `forward`, which a test gives."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(5))
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))
        self.norm = nn.BatchNorm1d(5)
        self.way = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.way(self, x)


ROWS = TensorDataset(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(9))


def uses_again(self: Any, x: torch.Tensor) -> torch.Tensor:
    start = self.stem(x)
    x = start * 1
    for block in self.blocks:
        x = torch.tanh(block(x)) * self.scale + 0.1 * start
    return self.head(x)


def test_what_blocks_use_again_is_computed_on_each_stage() -> None:
    layers = cut(Chain(uses_again), ROWS)
    assert layers.cut_problem is None
    assert ["stem.weight" in used for used in layers.plan.used] == [True] * 4 + [False, True]
    batch = load_micro_batch(ROWS, [0, 1, 2])
    expected, wanted = run([copy.deepcopy(layers).whole()], batch.input, batch.ids)
    output, gradients = run(stages_of(layers, 2, 4), batch.input, batch.ids)
    assert torch.allclose(output, expected, rtol=1e-6)
    for key, gradient in wanted.items():
        assert torch.allclose(gradients[key], gradient, rtol=1e-4, atol=1e-5), key


def test_a_parametrized_module_is_cut_and_keeps_its_names() -> None:
    model = Chain(lambda self, x: self.head(nn.Sequential(*self.blocks)(self.stem(x))))
    for block in model.blocks:
        weight_norm(block)
    names = list(model.state_dict())
    layers = cut(model, ROWS)
    assert layers.cut_problem is None and list(layers.saved_names()) == names
    batch = load_micro_batch(ROWS, [0, 1])
    expected, wanted = run([copy.deepcopy(layers).whole()], batch.input, batch.ids)
    output, gradients = run(stages_of(layers, 2, 4), batch.input, batch.ids)
    assert torch.equal(output, expected) and gradients.keys() == wanted.keys()


def test_a_stages_output_is_made_contiguous() -> None:
    transposed = torch.ones(2, 3).t()
    one, two = make_contiguous((transposed, transposed))
    assert one.is_contiguous() and two.is_contiguous()
    assert make_contiguous(transposed).is_contiguous()


def no_keys(x: Any) -> Any: ...
def two_keys(ids: Any, mask: Any = None) -> Any: ...
def any_keys(**values: Any) -> Any: ...
def one_and_any(batch: Any, **values: Any) -> Any: ...


def test_how_a_module_takes_its_input() -> None:
    pair = {"ids": 1, "mask": 2}
    assert spread(two_keys, pair) == ((), pair) == spread(any_keys, pair)
    assert spread(no_keys, pair) == ((pair,), {}) == spread(one_and_any, pair)
    assert spread(one_and_any, {"batch": 1, "more": 2}) == ((), {"batch": 1, "more": 2})
    assert spread(two_keys, [1, 2]) == ((1, 2), {}) and spread(no_keys, [1, 2]) == (([1, 2],), {})
    assert spread(two_keys, 5) == ((5,), {})
    with pytest.raises(TypeError, match="does not take 'kind' of the input; it takes: ids, mask"):
        spread(two_keys, {"ids": 1, "kind": 2})
    linear = nn.Linear(2, 2)
    assert spread(linear.forward, {"input": 1}) == ((), {"input": 1})

    class Output:
        logits = torch.ones(2)

    assert logits_of(Output()) is Output.logits and logits_of(3) == 3


def test_a_list_may_hold_functions_that_torch_has_modules_for() -> None:
    given = [nn.Linear(6, 5), torch.relu, nn.functional.gelu, torch.tanh, torch.flatten]
    assert [type(x).__name__ for x in as_layers(given)] == (
        ["Linear", "ReLU", "GELU", "Tanh", "Flatten"]
    )
    with pytest.raises(ValueError, match="layer 1 is the function exp; valid"):
        as_layers([nn.Linear(6, 5), torch.exp])


@pytest.mark.parametrize("name", SETS)
def test_saved_names_are_those_that_the_class_loads(name: str) -> None:
    model = getattr(brought, name)()[0]
    layers = as_layers(model)
    tensors = layers.tensors()
    saved = {n: tensors[source] for n, source in layers.saved_names().items()}
    again = getattr(brought, name)()[0]
    again.load_state_dict(saved, strict=True)
    assert "position_ids" not in saved
    chain = as_layers(nn.Sequential(brought.OrderedDict(one=nn.Linear(2, 3), two=nn.Tanh())))
    assert list(chain.tensors()) == list(chain.saved_names()) == ["one.weight", "one.bias"]
    assert [n for n, _ in chain.whole().named_parameters()] == ["one.weight", "one.bias"]
