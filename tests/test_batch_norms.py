"""Batch norm: one set of buffers, statistics without padding, state moved once, and runs held
against `single` cut as they are."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import hybrid
from hybrid import records
from hybrid.checkpoint.pieces import WEIGHT, Piece
from hybrid.comparison.controls import Control
from hybrid.comparison.differences import Run, elements_apart, scale_of, weight_differences
from hybrid.comparison.verdict import judge_run
from hybrid.engines.buffers import SharesInTurn, copy_buffers, moved_buffers
from hybrid.engines.layers import prepare_layers
from hybrid.models.batch_norms import find_batch_norms, leave_padding_out
from hybrid.models.dropout import use_rows
from hybrid.models.layers import Layers
from hybrid.models.losses import cross_entropy
from hybrid.records import EvalResult, Parity, Record
from hybrid.training.projection import project
from tests.conftest import small_job


class Normed(nn.Module):
    """A layer with a batch norm."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(size, out), nn.BatchNorm1d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, size] to [rows, out]."""
        return torch.tanh(self.norm(self.dense(x)))


def normed() -> tuple[list[nn.Module], Any]:
    """Two such layers, and a mask that is infinite."""
    last = nn.Linear(11, 10)
    last.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    return [Normed(32, 12), Normed(12, 11), last], cross_entropy


NORMED = {"name": "tests.test_batch_norms:normed"}


# --- statistics ---


@pytest.mark.parametrize("lines", [1, 3])
def test_padding_has_no_part_in_statistics(lines: int) -> None:
    torch.manual_seed(0)
    norm, plain = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    leave_padding_out([norm])
    x = torch.randn(5 * lines, 4)
    with use_rows([1, 2, 3, None, None]):
        out = norm(x)
    assert torch.equal(out[: 3 * lines], plain(x[: 3 * lines])) and out.shape == x.shape
    for mine, theirs in zip(norm.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    with use_rows([None]):
        norm(x[:1]).sum().backward()  # torch refuses a lone row, and this one is none
    assert norm.weight.grad is not None and norm.num_batches_tracked == 1
    with use_rows([1, 2]):
        norm(x[:2])
    assert norm.num_batches_tracked == 2, "statistics no longer move"


def test_layers_are_named() -> None:
    layers = Layers([*normed()[0], nn.BatchNorm1d(3, affine=False)])
    leave_padding_out(layers.modules())
    names = ["0.norm (BatchNorm1d)", "1.norm (BatchNorm1d)", "3 (BatchNorm1d)"]
    assert find_batch_norms(layers) == names


class Counts(nn.Module):
    """Scales by a buffer that each training pass replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, ...] to the same."""
        if self.training:
            self.factor = self.factor * 1.5
        return (x * self.weight * self.factor).tanh()


def test_recomputation_moves_buffers_once_and_meets_those_that_were() -> None:
    def train(recompute: bool) -> list[torch.Tensor]:
        job = small_job(train__activation_checkpointing=recompute)
        torch.manual_seed(1)
        layers = prepare_layers(job, Layers([*normed()[0], Counts()]))
        model = layers.whole().train()
        for k in range(3):
            x = torch.randn(5, 32, generator=torch.Generator().manual_seed(k))
            model(x).square().sum().backward()
        return [*model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]

    for again, kept in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(again, kept, rtol=0, atol=0)


def test_shares_in_turn_begin_alike_and_the_first_is_kept() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    shares, batches = SharesInTurn(model), torch.randn(2, 4, 3)
    model(batches[0])
    first = copy_buffers(model)
    shares.end_share()
    assert not moved_buffers(model, shares.start)
    model(batches[1])
    assert moved_buffers(model, first)
    shares.end_step()
    assert not moved_buffers(model, first)


# --- verdicts ---


def known(label: str, dp: int = 1, **changes: Any) -> Record:
    """A record that ended well."""
    layout = {"pp": 1, "dp": dp, "replicate": dp, "shard": 1}
    return Record(label, "ok", world_size=dp, layout=layout, eval=EvalResult(1.0, 10), **changes)


def judge(
    job: Any, name: str, controls: dict[str, Record], layers: Sequence[str]
) -> Parity | list[Control]:
    """The verdict, or what it needs, of runs with equal weights."""
    runs = {"single": known("single"), "ddp": known("ddp", 2), "pipeline": known("pipeline")}
    return judge_run(
        job, name, runs, "single", controls, lambda n: Run({**controls, **runs}[n], {}), layers
    )


def test_a_run_is_held_against_single_cut_alike() -> None:
    job, layers = small_job(), ["0.norm (BatchNorm1d)"]
    wanted = judge(job, "ddp", {}, layers)
    assert isinstance(wanted, list)
    settings = {"emulate_ranks": 2, "micro_batches": 2}
    assert wanted == [Control("single_cut_2x2", "single", settings, 2)]
    found = judge(job, "ddp", {"single_cut_2x2": known("single", 2)}, layers)
    assert isinstance(found, Parity) and found.ok and found.reference == "single_cut_2x2"
    why = found.reference_because or ""
    assert "0.norm (BatchNorm1d) takes statistics of a micro-batch" in why
    assert "has 6 samples here and 12 under single; micro_batches = 1 in its section" in why
    lost = dataclasses.replace(known("single", 2), status="failed")
    missing = judge(job, "ddp", {"single_cut_2x2": lost}, layers)
    assert isinstance(missing, Parity) and missing.reference == "single_cut_2x2"
    assert missing.state == "not_compared"


def test_it_is_held_against_single_itself_where_no_layer_mixes_samples_or_the_cut_is_the_same() -> (
    None
):
    for name, layers in (("ddp", []), ("pipeline", ["0.norm"])):
        found = judge(small_job(), name, {}, layers)
        assert isinstance(found, Parity) and found.ok
        assert found.reference == "single" and found.reference_because is None


# --- what is not finite ---


def test_infinite_elements_that_are_alike_do_not_differ() -> None:
    one = numpy.array([math.inf, -math.inf, math.nan, 1.0, 2.0])
    assert weight_differences({"b": one}, {"b": one}) == []
    assert weight_differences({"b": numpy.empty(0)}, {"b": numpy.empty((0,))}) == []
    assert scale_of(one, 0.0) == 2.0, "infinity hides what else differs"
    (found,) = weight_differences({"b": one}, {"b": one + numpy.eye(5)[4] * 1e-3})
    assert found.size == pytest.approx(1e-3 / 2.001) and found.elements == 1
    other = numpy.array([math.inf, math.inf, 0.0, 1.0, math.nan])
    assert list(elements_apart(one, other)) == [0, math.inf, math.inf, 0, math.inf]
    (found,) = weight_differences({"b": one}, {"b": other})
    assert found.size == math.inf


def test_a_projection_is_a_number_and_shows_where_infinity_is() -> None:
    masks = [torch.full((3, 3), -math.inf).triu(1), torch.full((3, 3), -math.inf).tril(-1)]
    empty = Piece("empty", WEIGHT, (0,), torch.empty(0))
    values = [project([Piece("mask", WEIGHT, (3, 3), mask), empty]) for mask in masks]
    assert all(math.isfinite(v) for value in values for v in value.values())
    assert values[0]["mask"] != values[1]["mask"] and values[0]["empty"] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_record_holds_an_evaluation_that_is_not_finite(tmp_path: Path, value: float) -> None:
    record = dataclasses.replace(known("ddp"), eval=EvalResult(value, 10))
    records.write(record, tmp_path / "record.json")
    said = json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert said["eval"]["loss"] == str(value)
    back = records.read(Record, tmp_path / "record.json").eval
    assert back is not None and str(back.loss) == str(value)


def test_unequal_ranks_compute_what_single_does_cut_alike(tmp_path: Path) -> None:
    """Batches of 22, the last of an epoch 12, on 3 ranks: buffers and an infinite mask too."""
    job = small_job(model=NORMED, train__global_batch=22, train__steps=6)
    result = hybrid.compare(job, ["ddp", "fsdp", "local_sgd", "pipeline"], 3, tmp_path)
    assert result.ok, {n: p.first_difference for n, p in result.parity.items()}
    names = {n: p.reference for n, p in result.parity.items()}
    assert names["ddp"] == names["fsdp"] == "single_cut_3x2" and names["pipeline"] == "single"
    page = (tmp_path / "compare.md").read_text()
    assert "held against single_cut_3x2" in page.replace("\n", " ")
