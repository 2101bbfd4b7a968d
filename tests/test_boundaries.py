"""What each layer of a model returns is found without memory or compute; what `prepare` gathers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hybrid.job.errors import JobError
from hybrid.models.layers import Layers
from hybrid.models.losses import cross_entropy
from hybrid.stages.checks import Boundary
from hybrid.training.check import _build, check_job, look_at_job
from tests.conftest import small_job
from tests.test_stage_checks import ROW, TOKENS, WIDTH, Returns, find


def test_shapes_dtypes_and_bytes_of_a_chain() -> None:
    layers = [nn.Embedding(5, WIDTH), Returns(), Returns(lambda x: x.flatten(1).bfloat16())]
    assert find(layers, TOKENS) == [
        Boundary(0, (("rows", 4, 8),), ("float32",), 4 * 8 * 4),
        Boundary(1, (("rows", 4, 8),), ("float32",), 4 * 8 * 4),
        Boundary(2, (("rows", 32),), ("bfloat16",), 32 * 2),
    ]


def test_axes_that_grow_with_the_rows_are_told_from_others() -> None:
    def several(x: torch.Tensor) -> Any:
        tall = x.reshape(-1, 2)
        return tall, x.mean(0), torch.cat((x, x[:1])), x.t().contiguous()

    (found,) = find([Returns(several)])
    assert found.shapes == (("4*rows", 2), (8,), ("rows+1", 8), (8, "rows"))
    assert found.bytes_per_row == 3 * 8 * 4, "what is fixed costs no row anything"


def test_layers_are_not_changed_and_need_no_numbers() -> None:
    layers = [Returns(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 2)]
    before = [{k: v.clone() for k, v in layer.state_dict().items()} for layer in layers]
    random = torch.get_rng_state()
    found = find(layers)
    assert [b.shapes for b in found][-1] == (("rows", 2),) and not any(b.unknown for b in found)
    for layer, state in zip(layers, before, strict=True):
        assert all(torch.equal(state[k], v) for k, v in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_large_model_costs_no_memory() -> None:
    with torch.device("meta"):
        layers = [nn.Linear(2**18, 2**18) for _ in range(3)]  # 256 GiB each
    found = find(layers, torch.zeros(1).expand(2**18))
    assert [b.bytes_per_row for b in found] == [2**20] * 3


def test_tensors_that_a_layer_makes_itself_need_no_memory_either() -> None:
    with torch.device("meta"):  # so that nothing can run for real
        layers = [Returns(lambda x: x + torch.arange(WIDTH) * torch.ones(())), Returns()]
    assert [b.shapes for b in find(layers)] == [(("rows", 8),)] * 2


def test_a_layer_that_needs_numbers_runs_for_real() -> None:
    layers = [Returns(), Returns(lambda x: x * x.sum().item() + torch.rand(())), Returns()]
    random = torch.get_rng_state()
    assert [b.shapes for b in find(layers)] == [(("rows", 8),)] * 3
    assert torch.equal(torch.get_rng_state(), random)


def test_preparing_finds_the_boundaries() -> None:
    prepared = check_job(small_job())
    assert prepared.summary.layer_parameters == [792, 400, 204, 130]
    assert [b.shapes[0] for b in prepared.summary.boundaries] == (
        [("rows", 24), ("rows", 16), ("rows", 12), ("rows", 10)]
    )
    assert prepared.summary.cut_problem is None and prepared.job.train.steps == 6
    own = check_job(
        small_job(
            model={"name": "tests.workloads:regression"}, data={"name": "tests.workloads:points"}
        )
    )
    assert [b.shapes[0][1] for b in own.summary.boundaries] == [20, 20, 20, 20, 3]


def test_preparing_a_shipped_model_holds_no_weights() -> None:
    own = {"name": "tests.workloads:regression"}
    for job, device in ((small_job(), "meta"), (small_job(model=own), "cpu")):
        assert {p.device.type for x in _build(job)[0] for p in x.parameters()} == {device}
    model = {"name": "gpt", "options": {"preset": "13b"}}  # 52 GB
    prepared = check_job(small_job(model=model, data={"name": "tests.workloads:sentences"}))
    assert sum(prepared.summary.layer_parameters) > 12e9
    assert prepared.summary.boundaries[-1].shapes == (("rows", 16, 50257),)
    assert {b.dtypes for b in prepared.summary.boundaries} == {("float32",)}


def test_preparing_refuses_a_tracker_before_all_else() -> None:
    with pytest.raises(JobError, match=r"log\.trackers = 'x': unknown; valid: "):
        check_job(small_job(log__trackers=["x"]))


def single() -> Any:
    """Data sets whose samples have no target."""
    return [ROW] * 3, [ROW] * 3


def whole() -> Any:
    """A model that cannot be cut."""
    layers = Layers([Returns()])
    layers.cut_problem = "its layers cannot be told apart"
    return layers, cross_entropy


def test_preparing_says_why_a_model_cannot_be_cut() -> None:
    model = {"name": "tests.test_boundaries:whole"}
    prepared = look_at_job(small_job(model=model, data__options={"features": WIDTH}))
    assert prepared.summary.cut_problem == "its layers cannot be told apart"


def test_preparing_refuses_samples_that_are_no_pairs() -> None:
    with pytest.raises(JobError) as refused:
        check_job(small_job(data={"name": "tests.test_boundaries:single"}))
    assert "train sample 0 is float32 [8]; valid: (input, target)" in str(refused.value)
