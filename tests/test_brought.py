"""Modules that people bring train under the strategies with stages as in one process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

import hybrid
from hybrid.data.loader import load_micro_batch
from hybrid.job.errors import Unsupported
from hybrid.launch.placement import Placement
from hybrid.models.losses import cross_entropy as summed_cross_entropy
from hybrid.strategies.registry import open_engine
from hybrid.training.check import check_job
from tests import brought_models as brought
from tests.conftest import ROOT, small_job

DATA = {"bert": "masked_sentences", "vit": "images", "nanogpt": "tokens", "resnet": "images"}


def job_of(name: str, **changes: Any) -> Any:
    """Four steps on batches that divide by nothing, by one of the models that people bring."""
    return small_job(
        model={"name": f"tests.brought_models:{name}"},
        data={"name": f"tests.brought_models:{DATA[name]}"},
        **{"train__global_batch": 14, "train__micro_batches": 3, "train__steps": 4, **changes},
    )


def normed() -> tuple[nn.Module, Any]:
    """A module in the middle of which torch's weight norm holds two tensors for one."""
    layers = [nn.Linear(32, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 10)]
    weight_norm(layers[1])
    return nn.Sequential(*layers), summed_cross_entropy


@pytest.mark.parametrize(("name", "nproc"), [("bert", 4), ("vit", 2)])
def test_a_module_trains_in_stages_as_in_one_process(name: str, nproc: int, tmp_path: Path) -> None:
    strategies = ["pipeline", "2d"] if nproc == 4 else ["pipeline"]
    result = hybrid.compare(job_of(name), strategies, nproc=nproc, out=tmp_path)
    for strategy in strategies:
        record, parity = result.strategies[strategy], result.parity[strategy]
        assert record.status == "ok", record.reason
        assert parity.ok and parity.max_loss_diff < 1e-6 and parity.max_weight_diff < 1e-5
        held = record.receipt.evidence["layers_by_stage"]
        assert [i for layers in held for i in layers] == list(range(7 if name == "bert" else 8))
    model = getattr(brought, name)()[0].eval()
    saved = load_file(tmp_path / "pipeline" / "checkpoints" / "final" / "model.safetensors")
    model.load_state_dict(saved, strict=True)
    test_set = getattr(brought, DATA[name])()[1]
    batch = load_micro_batch(test_set, list(range(len(test_set))))
    with torch.no_grad():
        output = model(**batch.input) if name == "bert" else model(batch.input)
    recorded = result.strategies["pipeline"].eval
    assert recorded and abs(float(cross_entropy(output, batch.target)) - recorded.loss) < 1e-5


def test_a_mask_that_stays_on_the_first_stage_is_caught(tmp_path: Path) -> None:
    program = [
        sys.executable,
        str(ROOT / "tests" / "faulty.py"),
        "mask_on_the_first_stage_alone",
    ]
    job = job_of("bert", train__steps=1)
    result = hybrid.compare(job, ["pipeline"], nproc=2, out=tmp_path, program=program)
    first = result.parity["pipeline"].first_difference
    assert not result.ok and first and (first.step, first.quantity) == (0, "loss")


def test_a_parametrized_layer_trains_in_stages_and_keeps_its_names(tmp_path: Path) -> None:
    job = small_job(model={"name": "tests.test_brought:normed"}, train__steps=3)
    result = hybrid.compare(job, ["pipeline"], nproc=2, out=tmp_path)
    assert result.parity["pipeline"].ok, result.parity["pipeline"]
    saved = load_file(tmp_path / "pipeline" / "checkpoints" / "final" / "model.safetensors")
    assert "1.parametrizations.weight.original1" in saved
    normed()[0].load_state_dict(saved, strict=True)


def test_the_check_says_what_a_module_is_cut_into() -> None:
    summary = check_job(job_of("nanogpt")).summary
    assert summary.cut_problem is None and len(summary.layer_parameters) == 7
    assert summary.layer_parameters[-1] == (101 + 2) * 24, "the tied head counts on both"
    assert list(summary.boundaries) == []


def test_an_engine_of_ones_own_loop_takes_a_module() -> None:
    torch.manual_seed(0)
    model = brought.vit()[0]
    with pytest.raises(Unsupported, match="no `samples` were given to open_engine"):
        open_engine(job_of("vit"), "pipeline", model, summed_cross_entropy, Placement(world_size=2))
    engine = open_engine(job_of("vit"), "single", model, summed_cross_entropy)
    batch = load_micro_batch(brought.images()[0], [0, 1, 2])
    assert engine.train_step([batch]).loss > 0
    assert engine.state().keys() == brought.vit()[0].state_dict().keys()
    engine.close()
