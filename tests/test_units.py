"""FSDP2's units are the planned modules, as objects, and the receipt counts them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.engines import accelerator
from hybrid.job.errors import Unsupported
from hybrid.launch.process_group import cleanup
from hybrid.models import build_model
from hybrid.models.layers import Layers
from hybrid.records import Receipt
from hybrid.strategies import registry
from hybrid.training.check import check_job
from tests.conftest import small_job
from tests.workloads import Block, squared_error


def receipt(layers: Layers, **changes: Any) -> Receipt:
    """What FSDP2 shows of itself on one rank."""
    engine = hybrid.open_engine(small_job(**changes), "fsdp", layers, squared_error)
    try:
        return engine.receipt()
    finally:
        engine.close()
        cleanup()


def nested() -> Layers:
    """A layer of the class that other layers have inside."""
    return Layers([nn.Linear(12, 20), Block(20), Block(20), nn.Tanh(), nn.Linear(20, 3)])


CHANGES = [{}, {"train__activation_checkpointing": True}, {"train__compile": True}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_class_inside_another_layer_makes_no_unit(changes: dict[str, Any]) -> None:
    found = receipt(nested(), **changes)
    assert found.engaged, found.reason
    seen = found.evidence
    assert (seen["units"], seen["planned_units"], seen["other_units"]) == (4, 4, [])
    assert seen["elements_outside_units"] == 0 and seen["reshard_after_forward"] == [True] * 4


def test_layers_that_share_a_parameter_belong_to_the_root() -> None:
    layers = nested()
    layers[2].second.weight = layers[1].second.weight
    found = receipt(layers, strategy__fsdp={"reshard_after_forward": False})
    assert found.engaged, found.reason
    inside = 12 * 20 + 20 + 20 * 3 + 3
    total = sum(p.numel() for p in layers.names())
    seen = found.evidence
    assert (seen["units"], seen["planned_units"]) == (2, 2)
    assert seen["elements_outside_units"] == total - inside
    assert seen["reshard_after_forward"] == [False] * 2


def test_a_norm_among_the_layers_is_a_unit_like_the_others() -> None:
    found = receipt(Layers([nn.Linear(12, 5), nn.LayerNorm(5), nn.Linear(5, 3)]))
    assert found.engaged and found.evidence["units"] == 3, found.reason
    assert found.evidence["reshard_after_forward"] == [True] * 3


class _Brought(Layers):
    """A module with a norm of its own at the end, whose blocks are its units."""

    def units(self) -> list[nn.Module]:
        return list(self[0].blocks)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(12), Block(12)])
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)


def test_accelerate_makes_no_further_units_of_a_module_that_was_brought() -> None:
    found = receipt(_Brought([_Model()]))
    assert found.engaged, found.reason
    assert found.evidence["units"] == 2 and found.evidence["other_units"] == []
    assert found.evidence["elements_outside_units"] == 2 * 12 + 12 * 3 + 3


def _by_class(units: Any) -> Any:
    """Wrap as Accelerate does: by class, also inside other layers."""
    from accelerate.utils import fsdp_utils

    @contextlib.contextmanager
    def wrapped() -> Any:
        own, kinds = fsdp_utils.fsdp2_prepare_auto_wrap_policy, tuple(map(type, units))
        policy: Any = lambda plugin, model: lambda m: isinstance(m, kinds)  # noqa: E731
        fsdp_utils.fsdp2_prepare_auto_wrap_policy = policy
        try:
            yield
        finally:
            fsdp_utils.fsdp2_prepare_auto_wrap_policy = own

    return wrapped()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda units: contextlib.nullcontext(), "each of 4 layers is a unit"),
        (_by_class, "each layer's parameters are in its unit"),
        (lambda units: BY_OBJECT(units[1:]), "each of 4 layers is a unit"),
        (lambda units: BY_OBJECT([*units, units[1].first]), "each layer's parameters are in its"),
    ],
)
def test_other_units_than_planned_are_refused(
    fault: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "_by_object", fault)
    found = receipt(nested())
    assert not found.engaged and found.reason and reason in found.reason, found.reason


BY_OBJECT = accelerator._by_object


def test_a_unit_beside_the_planned_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = _Brought([_Model()])
    head = layers[0].head
    monkeypatch.setattr(accelerator, "_by_object", lambda units: BY_OBJECT([*units, head]))
    found = receipt(layers)
    assert not found.engaged and "no other module is a unit" in str(found.reason)
    assert found.evidence["other_units"] == ["Linear"]


def test_accelerate_still_takes_no_policy_of_ones_own() -> None:
    """hybrid/engines/accelerator.py::_by_object"""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    plugin = SimpleNamespace(auto_wrap_policy=lambda module: True)
    assert fsdp2_prepare_auto_wrap_policy(plugin, nn.Linear(2, 2)) is None


def why_not(shape: list[int], strategy: str, trained: bool = True, nproc: int = 4) -> str | None:
    """Why a strategy does not take a parameter of this shape."""
    options = {"shape": shape, "trained": trained}
    model = {"name": "tests.workloads:odd", "options": options}
    checked = check_job(small_job(model=model, data={"name": "tests.workloads:points"}))
    try:
        registry.plan(checked.job, strategy, nproc, checked.summary)
    except Unsupported as error:
        return str(error)
    return None


def test_parameters_that_an_engine_cannot_take_are_named() -> None:
    for strategy in ("fsdp", "zero1", "zero2", "zero3", "pipeline", "2d"):
        nproc = 4 if strategy == "2d" else 2
        said = why_not([], strategy, nproc=nproc)
        assert said and said.startswith("parameter 1.odd has no axes (shape []): "), strategy
        assert said.endswith("give it shape [1]") and why_not([1], strategy, nproc=nproc) is None
        assert why_not([], strategy, trained=False, nproc=nproc), "frozen ones too"
        said = why_not([0, 7], strategy, nproc=nproc)
        assert bool(said) == (strategy in ("fsdp", "zero3"))
        assert not said or said.startswith("parameter 1.odd has no elements: ")
        frozen = why_not([0, 7], strategy, trained=False, nproc=nproc)
        assert bool(frozen) == (strategy == "zero3"), "FSDP2 has no gradient to reduce then"
    for strategy in ("ddp", "local_sgd"):
        assert why_not([], strategy) is None and why_not([0], strategy) is None


def test_several_parameters_are_named_together() -> None:
    layers = build_model(small_job())[0]
    for i, layer in enumerate(layers):
        layer.register_parameter("s", nn.Parameter(torch.ones(())))
        assert i < 4
    with pytest.raises(Unsupported, match=r"parameters 0\.s, 1\.s, 2\.s, \.\.\. have no axes .*m"):
        hybrid.open_engine(small_job(), "fsdp", layers, squared_error)
