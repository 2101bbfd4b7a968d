"""The shipped jobs, whole: every strategy engaged and equal to `single`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hybrid
from tests.conftest import JOBS, compare_by_command, largest_differences

ALL = {"single", "ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d"}


def compare(out: Path, name: str, epochs: int, nproc: int) -> dict[str, Any]:
    """What a comparison of a shipped job leaves for programs to read."""
    hybrid.compare(hybrid.load_job(JOBS / name, {"train.epochs": epochs}), nproc=nproc, out=out)
    result: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return result


def hold(result: dict[str, Any], not_possible: set[str]) -> None:
    """The comparison held, and exactly the named strategies could not run."""
    records, parity = result["strategies"], result["parity"]
    assert set(records) == ALL
    assert {n for n, r in records.items() if r["status"] == "not_possible"} == not_possible
    for name in sorted(ALL - not_possible):
        assert records[name]["status"] == "ok", (name, records[name]["reason"])
        assert records[name]["receipt"]["engaged"]
        assert parity[name]["ok"], (name, parity[name]["first_difference"])
        assert parity[name]["max_loss_diff"] < 1e-6, name
        assert parity[name]["max_weight_diff"] < 1e-5, name
        assert not parity[name]["excused"], "held by the strict tolerance alone"
        assert records[name]["eval"]["correct"] == records["single"]["eval"]["correct"]
        assert records[name]["throughput"]["samples_per_s"] > 0
    assert result["ok"]


@pytest.mark.parametrize(("nproc", "epochs", "accuracy"), [(2, 3, 0.9), (3, 1, 0.8), (4, 1, 0.8)])
def test_mnist_under_every_strategy(
    nproc: int, epochs: int, accuracy: float, tmp_path: Path
) -> None:
    """Whole on two processes, one epoch of it on more."""
    result = compare(tmp_path, "mnist.toml", epochs, nproc)
    hold(result, not_possible=set() if nproc == 4 else {"2d"})
    for name, record in result["strategies"].items():
        if record["status"] == "ok":
            assert record["eval"]["accuracy"] >= accuracy
            assert largest_differences(result, name) < 1e-6
        else:
            assert "2 stages x 2 or more columns" in record["reason"]
    assert (tmp_path / "report.html").stat().st_size > 1e6
    assert "ddp" in (tmp_path / "compare.md").read_text()
    check_costs(result, nproc)


def check_costs(result: dict[str, Any], nproc: int) -> None:
    """Figures that theory gives exactly (facts of this job: 567,434 parameters, momentum SGD)."""
    records = result["strategies"]
    parameters = 4 * 567_434
    gradients = records["ddp"]["comm"]["by_op"]["all_reduce"]["payload_bytes"]
    assert gradients == [pytest.approx(parameters, rel=1e-3)] * nproc
    assert records["fsdp"]["receipt"]["evidence"]["local_share"] == pytest.approx(1 / nproc, 0.02)
    for name, record in records.items():
        if record["status"] != "ok" or name == "single":
            continue
        sent, wire = record["comm"]["bytes_per_step"], record["comm"]["tcp_bytes_per_step"]
        assert sum(wire) == pytest.approx(sum(sent), rel=0.05), name
    single, ddp = (max(records[n]["memory"]["peak_bytes"]) for n in ("single", "ddp"))
    # DDP's buckets are the gradients themselves, no copy; the second step builds some anew.
    assert 0 < ddp - single < 0.8 * parameters
    assert max(records["fsdp"]["memory"]["peak_bytes"]) < single


def test_the_document_s_linear_model_cannot_be_cut(tmp_path: Path) -> None:
    result = compare(tmp_path, "linear.toml", epochs=4, nproc=4)
    hold(result, not_possible={"pipeline", "2d"})
    for name in ("pipeline", "2d"):
        assert "the model has 1 layer" in result["strategies"][name]["reason"]
    record = result["strategies"]["local_sgd"]
    assert [d["step"] for d in record["drift"]] == list(range(9, 40, 10)), "once an epoch"
    assert result["parity"]["local_sgd"]["reference"] == "local_sgd_emulation"


def test_the_document_s_mlp_runs_as_three_stages(tmp_path: Path) -> None:
    result = compare(tmp_path, "mlp.toml", epochs=2, nproc=3)
    hold(result, not_possible={"2d"})
    evidence = result["strategies"]["pipeline"]["receipt"]["evidence"]
    assert [rank["layers"] for rank in evidence["ranks"]] == [[0], [1], [2]]
    assert [rank["parameters"] for rank in evidence["ranks"]] == [401_920, 131_328, 2_570]


def test_a_stage_without_parameters_is_refused(tmp_path: Path) -> None:
    """tests.workloads:regression has a layer of its own for its activation."""
    own = ["--set", "model.name=tests.workloads:regression", "--set", "model.options={}"]
    own += ["--set", "data.name=tests.workloads:points", "--set", "data.options={}"]
    cut = ["--set", "strategy.pipeline.partition=[3, 1, 1]", "--set", "train.steps=2"]
    arguments = [str(JOBS / "linear.toml"), "--nproc", "3", "--strategies", "pipeline"]
    status, result = compare_by_command(tmp_path, *arguments, *own, *cut)
    record = result["strategies"]["pipeline"]
    assert status == 0 and record["status"] == "not_possible"
    assert "stage 1 (layers 3 to 3) would have no parameters" in record["reason"]
