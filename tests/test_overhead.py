"""Costs beside hand-written loops: equal losses first, exact counts, figures that can be void."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from benchmarks import overhead
from benchmarks.baselines import tables, verdicts
from benchmarks.baselines.verdicts import Spread
from benchmarks.baselines.workloads import SHAPES, STRATEGIES, Workload
from hybrid.engines.deepspeed_setup import full_config
from hybrid.launch.placement import Placement
from hybrid.layout import Layout
from tests.conftest import ROOT

COUNTED = {"aten", "host_reads", "lists", "calls", "bytes", "collectives", "by_name"}
COUNTED |= {"same", "not_counted"}


class OtherRate(Workload):
    """A workload whose optimizer has another learning rate than the job."""

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=2 * self.shape.optimizer["lr"])


def make(workload: Workload, reads: bool = False) -> Callable[[], Any]:
    """A hand-written loop with a mistake: the rank that imports this file runs it as a row."""
    from benchmarks.baselines import ddp

    return ddp.make(OtherRate(**dataclasses.asdict(workload)), reads)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """One small run with a planted row; its exit code and its folder."""
    out = tmp_path_factory.mktemp("overhead")
    command = [sys.executable, "-m", "benchmarks.overhead", "--out", str(out), "--small"]
    command += ["--strategies", "ddp", "--workloads", "trivial"]
    command += ["--rows", "raw_reads,engine,loop", "--more", __name__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (out / "overhead.json").exists(), done.stdout + done.stderr
    return done.returncode, out


def test_rows_are_compared_counted_and_timed(measured: tuple[int, Path]) -> None:
    found = json.loads((measured[1] / "overhead.json").read_text())
    assert {"about", "command", "blocks", "sessions", "claims"} == found.keys()
    (session,) = found["sessions"]
    assert (session["strategy"], session["workload"], session["ranks"]) == ("ddp", "trivial", 2)
    rows = session["rows"]
    names = {"raw", "raw_again", "raw_reads", "raw_loads", "engine", "loop"}
    assert names == rows.keys() - {__name__}
    for name in names:
        row = rows[name]
        assert row["status"] == "ok", row
        assert row["compared"] == 5 and row["difference"] <= 1e-6
        assert len(row["counts"]) == 2 and all(c.keys() == COUNTED for c in row["counts"])
        assert all(c["same"] for c in row["counts"]), "two counts of a step must agree"
        assert len(row["cpu_us"]) == len(row["wall_us"]) == 2 and min(row["cpu_us"]) > 0
    (first, _) = rows["raw"]["counts"]
    assert first["collectives"] == {"all_reduce": {"calls": 1, "bytes": 4 * (8 * 2 + 2)}}
    assert first["host_reads"] == 0 and rows["raw_reads"]["counts"][0]["host_reads"] == 2
    judged = {(claim["row"], claim["promise"]) for claim in found["claims"]}
    assert len(judged) == 6 and {row for row, _ in judged} == {"engine", "loop"}


def test_a_loop_with_another_learning_rate_is_refused(measured: tuple[int, Path]) -> None:
    code, out = measured
    (session,) = json.loads((out / "overhead.json").read_text())["sessions"]
    planted = session["rows"][__name__]
    assert code == 1 and planted["status"] == "refused" and planted["difference"] > 1e-4
    assert "cpu_us" not in planted, "what computes something else has no cost to compare"
    assert overhead.problems([session]) == [f"ddp trivial {__name__}"]
    assert f"ddp trivial {__name__} refused: losses [" in (out / "overhead.md").read_text()
    del session["rows"][__name__]
    assert overhead.problems([session]) == []


def row(base: str, cpu_us: list[float], **counts: Any) -> dict[str, Any]:
    """A row of a session, with the counts of one rank."""
    numbers = {"aten": 100.0, "host_reads": 0.0, "calls": 1.0, "bytes": 4e6, "lists": 0.0}
    counted = numbers | {"collectives": {}, "by_name": {}, "same": True} | counts
    common = {"status": "ok", "reason": None, "kind": "raw", "base": base, "difference": 0.0}
    common |= {"plain": "raw", "reads": 0}
    return common | {"counts": [counted], "cpu_us": cpu_us, "wall_us": cpu_us}


def session(workload: str, again: list[float], engine: list[float], **counts: Any) -> Any:
    """A session of three blocks, in which the hand-written loop takes 1000 us."""
    raw = [1000.0] * 3
    rows = {"raw": row("raw", raw), "raw_again": row("raw", again)}
    rows["engine"] = row("raw", engine, **counts) | {"kind": "hybrid"}
    return {"strategy": "ddp", "workload": workload, "rows": rows}


def results(found: Any) -> dict[str, str]:
    """Whether each promise holds."""
    return {claim.promise: claim.result for claim in verdicts.claims([found])}


def test_quantiles_lie_between_values() -> None:
    found = verdicts.spread([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found == Spread(pytest.approx(1.4), 3.0, pytest.approx(4.6))
    assert verdicts.spread([7.0]) == Spread(7.0, 7.0, 7.0) and 7.0 in verdicts.spread([7.0])
    assert f"{Spread(1.0, 2.0, 3.0):.1f}" == "2.0 [1.0, 3.0]"


@pytest.mark.parametrize(
    ("ratio", "same", "said"),
    [
        (1.2, Spread(0.99, 1.0, 1.01), ""),
        (1.005, Spread(0.99, 1.0, 1.01), "equal"),
        (1.2, Spread(1.01, 1.02, 1.03), "void: A/A 1.020 [1.010, 1.030]"),
        (1.06, Spread(0.95, 1.0, 1.05), "void: A/A 1.000 [0.950, 1.050], wider"),
    ],
)
def test_a_ratio_is_void_where_the_same_loop_differs_from_itself(
    ratio: float, same: Spread, said: str
) -> None:
    assert verdicts.judge_ratio(Spread(ratio, ratio, ratio), same) == said


def test_promises_are_judged() -> None:
    quiet, noisy = [1000.0, 990.0, 1010.0], [1000.0, 800.0, 1300.0]
    slow, fast = [1240.0, 1240.0, 1250.0], [1040.0, 1050.0, 1040.0]
    limit = "CPU over the hand-written loop"
    assert results(session("trivial", quiet, slow))[limit] == "yes"
    assert results(session("trivial", quiet, [1300.0] * 3))[limit] == "no"
    assert results(session("trivial", noisy, slow))[limit] == "void"
    limit = "at most 1.05 on MNIST"
    assert results(session("mnist", quiet, fast))[limit] == "yes"
    assert results(session("mnist", quiet, slow))[limit] == "no"
    assert results(session("mnist", noisy, fast))[limit] == "void"
    assert results(session("gpt", quiet, fast))["1.00 on the GPT"] == "no"
    assert results(session("gpt", quiet, quiet))["1.00 on the GPT"] == "yes"


@pytest.mark.parametrize(
    ("counts", "broken"),
    [
        ({"calls": 2.0, "bytes": 4e6 + 144}, None),
        ({"calls": 3.0}, "the same collectives and one small exchange"),
        ({"bytes": 4e6 + 4096}, "the same collectives and one small exchange"),
        ({"host_reads": 1.0}, "at most one host read a step, none unlogged"),
        ({"aten": 105.0}, None),
        ({"aten": 106.0}, "at most 5 % more operations on the GPT"),
    ],
)
def test_counts_are_judged(counts: dict[str, float], broken: str | None) -> None:
    found = results(session("gpt", [1000.0] * 3, [1000.0] * 3, **counts))
    assert {promise for promise, result in found.items() if result != "yes"} == {broken} - {None}


def test_peers_are_judged_and_missing_ones_are_named() -> None:
    found = session("mnist", [1000.0, 990.0, 1010.0], [1040.0] * 3)
    found["rows"]["fabric"] = row("raw", [1020.0, 1020.0, 1030.0]) | {"kind": "peer"}
    found["rows"]["trainer"] = {"status": "skipped", "reason": "not installed", "kind": "peer"}
    assert results(found)["at or below fabric on MNIST"] == "no"
    found["rows"]["fabric"]["cpu_us"] = [1100.0] * 3
    assert results(found)["at or below fabric on MNIST"] == "yes"
    logs = row("raw", [1030.0] * 3) | {"kind": "peer"}  # it does what hybrid does: it is judged
    judged = results(found | {"rows": found["rows"] | {"fabric_logs": logs}})
    assert judged["at or below fabric_logs on MNIST"] == "no"
    assert "at or below fabric on MNIST" not in judged
    page = tables.write({"sessions": [found], "about": "", "command": "", "blocks": 3})
    assert "| trainer | not installed | ddp mnist |" in page


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_share_a_batch_that_divides(name: str, strategy: str) -> None:
    ranks = {"single": 1, "2d": 4}.get(strategy, 2)
    seen: list[int] = []
    for rank in range(ranks):
        workload = Workload(name, strategy, rank, ranks)
        if rank < workload.columns:  # the others are later stages of the same columns
            seen += [i for _, _, ids in workload.fixed() for i in ids.tolist()]
        assert workload.job()["train"]["global_batch"] == workload.batch
    assert seen == list(range(workload.batch)), "each sample once"
    assert workload.batch == SHAPES[name].batch or (name, strategy) == ("mnist", "2d")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loops_by_hand_give_deepspeed_the_sizes_that_hybrid_gives(name: str, stage: int) -> None:
    """They decide how many collectives a step has."""
    workload = Workload(name, f"zero{stage}", 0, 2)
    job = hybrid.load_job(workload.job())
    model, _ = hybrid.build_model(job)
    here = Placement(0, 2, layout=Layout(dp=2, shard=2), device_asked="cpu")
    given = full_config(job, here, model, workload.strategy, stage)["zero_optimization"]
    by_hand = workload.deepspeed_config(stage)["zero_optimization"]
    assert {key: given[key] for key in by_hand} == by_hand
