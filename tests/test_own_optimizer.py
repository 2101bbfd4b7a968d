"""Optimizers by import path: what they are given, what is refused, and over which cuts they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.engines.optimizer import build_optimizer, drop_gradients
from hybrid.engines.optimizer_trial import check_optimizer, small_shapes
from hybrid.job.errors import JobError, Unsupported
from hybrid.models import build_model
from hybrid.strategies import registry
from hybrid.training.check import check_job
from tests import optimizers
from tests.conftest import small_job

GPT = {"num_layers": 5, "width": 48, "num_heads": 3, "context": 16, "vocab_size": 101}
CUTS = {"rows", "flat", "stages"}


def job(name: str, lr: float = 0.01, **changes: Any) -> hybrid.Job:
    """The small job with an optimizer by import path."""
    keys = {k.removeprefix("o__"): changes.pop(k) for k in list(changes) if k.startswith("o__")}
    return small_job(optimizer={"name": name, "lr": lr, **keys}, **changes)


def problems(asked: hybrid.Job) -> dict[str, str]:
    """How the job's optimizer cannot be cut."""
    return check_optimizer(asked, build_model(asked)[0])


def test_optimizers_of_torch_that_are_element_wise_run_over_every_cut() -> None:
    for name in ("Adam", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"):
        assert problems(job(f"torch.optim:{name}", o__weight_decay=0.1)) == {}, name
    assert problems(job("torch.optim:Adam", model={"name": "gpt", "options": GPT})) == {}
    fused = job("torch.optim:Adam", o__options={"fused": True, "amsgrad": True})
    assert problems(fused) == {}


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("tests.optimizers:Lion", set()),
        ("tests.optimizers:CountsAll", set()),
        ("torch.optim:Adafactor", {"rows", "flat"}),
        ("tests.optimizers:ElementWise", {"rows", "flat"}),
        ("tests.optimizers:ClipsLargeOnes", {"rows", "flat"}),
        ("tests.optimizers:RowMeans", {"flat"}),
        ("tests.optimizers:AllTogether", CUTS),
        ("tests.optimizers:Noisy", {*CUTS, "ranks"}),
        ("tests.optimizers:Remembers", {"flat"}),
        ("tests.optimizers:regrouped", {"groups"}),
    ],
)
def test_what_is_not_element_wise_is_measured(name: str, cuts: set[str]) -> None:
    for lr in (1e-5, 0.01, 30.0):
        assert problems(job(name, lr)).keys() == cuts, lr


def test_muon_is_found_where_the_model_has_matrices_alone() -> None:
    matrices = {"name": "tests.workloads:matrices"}
    found = problems(job("torch.optim:Muon", model=matrices))
    assert found.keys() == {"rows", "flat"} and "off by" in found["rows"]
    with pytest.raises(JobError, match="Muon only supports 2D parameters"):
        problems(job("torch.optim:Muon"))


def test_measuring_draws_nothing_from_the_generator_of_the_run() -> None:
    layers = build_model(small_job())[0]
    before = torch.get_rng_state()
    assert check_optimizer(job("tests.optimizers:Noisy"), layers)
    assert torch.equal(torch.get_rng_state(), before)


REFUSED = {
    "tests.optimizers:nothing": "has no attribute 'nothing'",
    "no_such_module:f": "cannot be imported: No module named",
    "tests.optimizers:GIVEN": "is not a function",
    "tests.optimizers:fails": "KeyError: 'no such thing'",
    "tests.optimizers:number": "returned a int; valid: a torch.optim.Optimizer",
    "tests.optimizers:first_alone": "was given 8 parameters and steps 1 of them",
    "tests.optimizers:rates_of_its_own": "its groups have the rates",
    "tests.optimizers:OwnRate": "optimizer.lr has no effect on it",
    "tests.optimizers:Rounded": "keeps its state in bf16; valid: fp32",
    "tests.optimizers:Still": "leaves all parameters as they are",
    "tests.optimizers:Explodes": "is not finite",
    "torch.optim:LBFGS": "its step needs closure",
    "torch.optim:SparseAdam": "cannot step: RuntimeError: SparseAdam does not support dense",
}


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_what_cannot_be_right_is_refused_in_one_line(name: str, words: str) -> None:
    with pytest.raises(JobError) as refused:
        problems(job(name))
    said = str(refused.value)
    assert words in said and name in said and said.startswith("optimizer.")
    assert len(said.splitlines()) == 1


def test_settings_without_an_effect_are_refused() -> None:
    decayed = job("tests.optimizers:ElementWise", o__weight_decay=1e-9)
    with pytest.raises(JobError, match=r"optimizer.weight_decay = 1e-09: .* does not read"):
        problems(decayed)
    # A weight decay that the function alone is given could not spare what `no_decay` names.
    assert problems(job("torch.optim:Adam", o__weight_decay=1e-9)) == {}
    moved = job("tests.optimizers:RateAtFirst", schedule={"name": "cosine"})
    with pytest.raises(JobError, match="a schedule has no effect on it"):
        problems(moved)
    assert problems(job("tests.optimizers:RateAtFirst")) == {}
    for key in ("lr", "weight_decay"):
        with pytest.raises(JobError, match=rf"optimizer.options.{key}: set optimizer.{key}"):
            problems(job("torch.optim:Adam", o__options={key: 0.1}))
    with pytest.raises(JobError, match="unexpected keyword argument 'beta'; valid: params, lr"):
        problems(job("torch.optim:Adam", o__options={"beta": 0.1}))
    fused = job("torch.optim:Adam", o__options={"fused": True}, train__precision="fp16")
    with pytest.raises(JobError, match="set fused = false"):
        problems(fused)


def test_it_is_given_the_groups_the_rates_and_the_options() -> None:
    asked = job("tests.optimizers:note", 0.5, o__weight_decay=0.25, o__options={"momentum": 0.75})
    named = dict(build_model(asked)[0].whole().named_parameters())
    spared = {name for name in named if name.endswith("bias")}
    made = build_optimizer(asked, named, spared)
    (given,) = optimizers.GIVEN
    assert [(g["lr"], g["weight_decay"]) for g in given] == [(0.5, 0.25), (0.5, 0.0)]
    assert {id(p) for p in given[1]["params"]} == {id(named[n]) for n in spared}
    assert made.defaults["momentum"] == 0.75 and made.defaults["lr"] == 0.5
    assert [g["weight_decay"] for g in made.param_groups] == [0.25, 0.0]


def test_small_shapes_stand_for_all_kinds() -> None:
    shapes = {"a": [3, 5], "b": [7], "c": [3, 5], "d": [10**6, 301], "e": [], "f": [0, 4]}
    small = small_shapes(shapes, {"c"})
    assert small.keys() == {"a", "b", "c", "d"} and small["a"] == [3, 5]
    assert small["d"][0] * small["d"][1] <= 2**12 and len(small["d"]) == 2
    assert small_shapes({"e": []}, ()) == {"0.weight": [7, 5]}
    many = {f"{i}": [i + 1] for i in range(20)} | {"last": [2, 2]}
    assert "last" in small_shapes(many, ()) and len(small_shapes(many, ())) == 8


def plan(asked: hybrid.Job, strategy: str, nproc: int = 4) -> str | None:
    """Why a strategy cannot run a job."""
    try:
        registry.plan(asked, strategy, nproc, check_job(asked).summary)
    except Unsupported as error:
        return str(error)
    return None


def test_strategies_refuse_what_they_cut() -> None:
    factored = job("torch.optim:Adafactor")
    for strategy in ("single", "ddp", "local_sgd", "pipeline"):
        assert plan(factored, strategy, 1 if strategy == "single" else 4) is None, strategy
    said = plan(factored, "fsdp")
    assert said and said.startswith("optimizer.name = 'torch.optim:Adafactor': fsdp shards each")
    assert "is not element-wise: cut so, its update is off by" in said
    for strategy in ("zero1", "zero2", "zero3", "2d"):
        said = plan(factored, strategy)
        assert said and "pieces of one flat buffer" in said, strategy
    assert plan(factored, "fsdp", 1) is None, "one rank has whole tensors"
    rounded = job("torch.optim:Adafactor", train__precision="bf16")
    assert "flat" in (plan(rounded, "pipeline") or ""), "it runs under ZeRO-1 then"
    whole = job("torch.optim:Adafactor", strategy__2d={"zero_stage": 0})
    assert plan(whole, "2d") is None
    together = job("tests.optimizers:AllTogether", strategy__2d={"zero_stage": 0})
    for strategy in ("pipeline", "2d"):
        assert "a part of the tensors on each stage" in (plan(together, strategy) or "")
    assert plan(together, "ddp") is None
    noisy = job("tests.optimizers:Noisy")
    assert "draws random numbers" in (plan(noisy, "ddp") or "") and plan(noisy, "ddp", 1) is None
    assert "groups" in (plan(job("tests.optimizers:regrouped"), "2d") or "")


def test_deepspeed_would_decay_what_adagrad_spares() -> None:
    keys = {"o__weight_decay": 0.1, "o__no_decay": ["biases"]}
    assert "Adagrad anew" in (plan(job("torch.optim:Adagrad", **keys), "zero1") or "")
    assert plan(job("torch.optim:Adagrad", o__weight_decay=0.1), "zero1") is None


def test_what_a_refusal_prevents_is_not_equal(tmp_path: Path) -> None:
    name = "tests.unchecked_zero"
    result = hybrid.compare(job("tests.optimizers:ElementWise"), [name], 2, tmp_path)
    assert result.strategies[name].status == "ok" and not result.parity[name].ok


def test_one_of_ones_own_and_its_schedule_are_equal_under_every_strategy(tmp_path: Path) -> None:
    """On four ranks, with a frozen tensor, and tensors of which most ranks have no piece."""
    asked = job(
        "tests.optimizers:Lion",
        0.003,
        o__weight_decay=0.1,
        o__no_decay=["biases"],
        o__options={"betas": [0.8, 0.9]},
        model={"name": "tests.workloads:partly_frozen"},
        data={"name": "tests.workloads:points"},
        schedule={"name": "tests.optimizers:noam", "options": {"warmup": 2}},
        train={"global_batch": 10, "micro_batches": 2, "steps": 4, "clip_norm": 0.5},
    )
    strategies = ["fsdp", "zero1", "zero3", "2d"]
    result = hybrid.compare(asked, strategies, 4, tmp_path)
    for name in strategies:
        record = result.strategies[name]
        assert record.status == "ok" and result.parity[name].ok, (name, record.reason)
        rates = [step.lr for step in record.steps]
        assert rates == pytest.approx([0.0015, 0.00225, 0.0015, 0.00075])
    record = result.strategies["fsdp"]
    assert record.receipt and 0 < record.receipt.evidence["elements_outside_units"] < 100


class Emptying(torch.optim.SGD):
    """Has a `zero_grad` of its own, which says that it was called."""

    calls = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls += 1
        super().zero_grad(set_to_none)


def test_gradients_are_dropped_and_a_zero_grad_of_ones_own_is_called() -> None:
    parameters = [nn.Parameter(torch.ones(size)) for size in (3, 1)]
    plain, own = torch.optim.SGD(parameters), Emptying(parameters)
    replaced = torch.optim.SGD([{"params": [parameter]} for parameter in parameters])
    calls: list[int] = []
    replaced.zero_grad = lambda *_: calls.append(1)  # type: ignore[assignment, method-assign]
    for optimizer, dropped in ((plain, True), (own, True), (replaced, False)):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        drop_gradients(optimizer)
        assert [parameter.grad is None for parameter in parameters] == [dropped] * 2
    assert own.calls == len(calls) == 1
