"""State that is special goes through a checkpoint: replicas, hooks, own optimizers, loss scales."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from hybrid.checkpoint.pieces import Piece
from hybrid.engines.merged_state import merged_pieces
from hybrid.engines.optimizer_numbers import note_groups, put_numbers, read_numbers
from hybrid.engines.optimizer_trial import check_optimizer
from hybrid.job.errors import JobError
from hybrid.launch.local import run_ranks
from hybrid.models import build_model
from hybrid.strategies import registry
from tests import optimizers
from tests.conftest import ROOT, small_job
from tests.resuming import Case, run_case

Results = dict[str, Any]


def own(name: str, **options: Any) -> dict[str, Any]:
    """An optimizer by import path."""
    return {"optimizer": {"name": name, "lr": 0.01, "options": options}, "train.steps": 7}


ADAMW = {"optimizer": {"name": "adamw", "lr": 0.01}, "train.steps": 7}
SYNC = {"strategy.local_sgd.sync_every": 4}
NORMED = {"model": {"name": "tests.test_batch_norms:normed"}, "data.options.samples": 96}
POINTS = {"data": {"name": "tests.workloads:points"}, "train.global_batch": 14}
STEEP = {
    "model": {"name": "tests.test_loss_scale:steep"},
    "data": {"name": "tests.workloads:points"},
    "optimizer": {"name": "adamw", "lr": 1e-4},
    "train.precision": "fp16",
}
# More than the MiB of DDP's first bucket, so that its buckets change after the first step.
WIDE = {"model.options.sizes": [32, 700, 700, 10], "strategy.ddp.bucket_cap_mb": 1}
POWERSGD = {"strategy.ddp.comm_hook": "powersgd"}
CASES: list[Case] = [
    {
        "name": "local_sgd",
        "strategy": "local_sgd",
        # The last batch of an epoch is cut otherwise, so replicas' weights in a merge change.
        "job": ADAMW | NORMED | SYNC | {"train.global_batch": 26, "data.options.samples": 100},
        "saves": [3, 4],
        "goes_on": [{"at": 3}, {"at": 4}, {"at": 3, "strategy": "fsdp"}],
    },
    {
        "name": "powersgd",
        "strategy": "ddp",
        "job": ADAMW | POWERSGD,
        "saves": [1, 4],
        "goes_on": [{"at": 1}, {"at": 4}, {"at": 4, "job": {"strategy.ddp.powersgd_rank": 2}}],
    },
    {
        "name": "powersgd in buckets",
        "strategy": "ddp",
        "job": ADAMW | POWERSGD | WIDE,  # torch's own hook aborts here, or waits for ever
        "saves": [4],
        "goes_on": [{"at": 4}],
    },
    {
        "name": "buckets",
        "strategy": "ddp",
        "job": ADAMW | WIDE,
        "saves": [4],
        "goes_on": [{"at": 4}, {"at": 4, "unrehearsed": True}],
    },
    {
        "name": "batch norm",
        "strategy": "ddp",
        "job": ADAMW | NORMED,
        "saves": [3],
        "goes_on": [{"at": 3}, {"at": 3, "strategy": "local_sgd", "job": SYNC}],
    },
    {
        "name": "replicate x shard",
        "strategy": "fsdp",
        "job": ADAMW | NORMED | {"parallel.replicate": 2, "parallel.shard": 2},
        "saves": [3],
        "goes_on": [{"at": 3}],
    },
    {
        "name": "keeps",
        "strategy": "fsdp",
        "job": own("tests.optimizers:Keeps") | {"optimizer.no_decay": ["biases"]},
        "saves": [1, 4],
        "goes_on": [{"at": 1}, {"at": 4}, {"at": 4, "strategy": "local_sgd", "job": SYNC}],
    },
    {
        "name": "rows",
        "strategy": "fsdp",
        "job": own("tests.optimizers:RowsMean"),
        "saves": [4],
        "goes_on": [{"at": 4}, {"at": 4, "strategy": "ddp"}],
    },
    {
        "name": "own rows",
        "strategy": "fsdp",
        "job": own("tests.optimizers:KeepsOwnRows"),
        "saves": [1],
    },
    *(
        Case(
            name=f"fp16 {strategy}",
            strategy=strategy,
            job=STEEP | SYNC | {"train.steps": 10},
            growth=2,
            saves=[1, 5, 7],  # after an overflow, and between two of the steps that a growth takes
            goes_on=[{"at": 1}, {"at": 5}, {"at": 7}],
        )
        for strategy in ("fsdp", "local_sgd")
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What all cases came to on four ranks."""
    out = tmp_path_factory.mktemp("resuming")
    (out / "cases.json").write_text(json.dumps(CASES))
    program = [sys.executable, str(ROOT / "tests" / "resuming.py")]
    modules = registry.modules("fsdp")
    run_ranks(4, [str(out / "cases.json"), str(out)], out, program=program, modules=modules)
    results: Results = json.loads((out / "result.json").read_text())
    return results


def same(case: Results, *which: int) -> bool:
    """Whether these runs went on as the one without a stop, to the same bits on every rank."""
    whole = case["whole"]
    for i in which:
        run = case["goes_on"][i]
        alike = run["losses"] == whole["losses"][-len(run["losses"]) :]
        if not alike or any(run[k] != whole[k] for k in ("hash", "own", "scale", "numbers")):
            return False
    return True


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("local_sgd", (0, 1)),
        ("powersgd", (0, 1)),
        ("powersgd in buckets", (0,)),
        ("buckets", (0,)),
        ("batch norm", (0,)),
        ("replicate x shard", (0,)),
        ("keeps", (0, 1)),
        ("rows", (0,)),
        ("fp16 fsdp", (0, 1, 2)),
        ("fp16 local_sgd", (0, 1, 2)),
    ],
)
def test_the_same_strategy_goes_on_to_the_same_bits(
    found: Results, name: str, which: tuple[int, ...]
) -> None:
    assert same(found[name], *which)


def test_what_the_cases_show(found: Results) -> None:
    assert not same(found["buckets"], 1), "without a rehearsal DDP sums up in other buckets"
    assert found["local_sgd"]["whole"]["own"] != found["local_sgd"]["goes_on"][2]["own"]
    notes = [run["notes"] for run in found["powersgd"]["goes_on"]]
    assert notes[:2] == [[], []] and "begins anew" in notes[2][0]
    assert found["keeps"]["whole"]["numbers"]["groups"][1] == {
        "k": 7,
        "weight": 1 / 7,
        "least": 0.5,
    }
    assert "is a plain tensor of this rank's rows alone" in found["own rows"]["error"]
    scales = found["fp16 fsdp"]["whole"]["scales"]
    assert min(scales) < scales[0], "a step overflowed"
    assert any(b > a for a, b in itertools.pairwise(scales)), "the scale has grown"


# --- in one process ---


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("local_sgd", {"strategy.local_sgd": {"sync_every": 4, "emulate_replicas": 3}}),
        ("single", {"strategy.single": {"emulate_ranks": 3, "move_weights": 1}}),
    ],
)
def test_emulations_go_on(strategy: str, settings: dict[str, Any], tmp_path: Path) -> None:
    case = Case(name="c", strategy=strategy, job=ADAMW | NORMED | settings, saves=[3])
    case["goes_on"] = [{"at": 3}]
    try:
        assert same(run_case(case, tmp_path), 0)
    finally:
        hybrid.cleanup()


def test_a_run_of_replicas_goes_on_between_merges(tmp_path: Path) -> None:
    """Its record has all merges. The loss must see an output before the first step here."""
    settings = {"sync_every": 4, "emulate_replicas": 3}
    changes = ADAMW | POINTS | {"model": {"name": "tests.workloads:regression"}}
    job = small_job(**changes, strategy__local_sgd=settings, checkpoint__every=3)
    whole = hybrid.train(job, "local_sgd", tmp_path / "whole")
    for step in (3, 6):
        folder = tmp_path / "whole" / "checkpoints" / f"step-{step:08d}"
        record = hybrid.train(job, "local_sgd", tmp_path / f"from{step}", resume=folder)
        assert record.steps == whole.steps and record.checkpoint == whole.checkpoint
        assert record.drift == whole.drift and len(record.drift or []) == 2
        assert record.receipt and record.receipt.evidence["merges"] == 2


OPTIMIZERS = {
    "Adagrad": {}, "RMSprop": {"momentum": 0.9, "centered": True}, "NAdam": {}, "Rprop": {},
    "ASGD": {"t0": 2}, "AdamW": {"amsgrad": True}, "Adafactor": {},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_torch_go_on(name: str, tmp_path: Path) -> None:
    job = own(f"torch.optim:{name}", **OPTIMIZERS[name]) | POINTS
    job |= {"model": {"name": "tests.workloads:strided"}}
    case = Case(name="c", strategy="single", job=job, saves=[1, 4])
    case["goes_on"] = [{"at": 1}, {"at": 4}]
    assert same(run_case(case, tmp_path), 0, 1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("KeepsList", "keeps a list, 'history', of a parameter"),
        ("CountsAll", "keeps state under 'shared', of no parameter"),
        ("ChangesList", "changes a list, 'rates', in its groups"),
    ],
)
def test_what_no_checkpoint_can_hold_is_refused_before_the_run(name: str, said: str) -> None:
    settings: dict[str, Any] = {"optimizer": {"name": f"tests.optimizers:{name}", "lr": 0.01}}
    check_optimizer(small_job(**settings), build_model(small_job())[0])
    job = small_job(**settings, checkpoint__every=2)
    with pytest.raises(JobError, match=said):
        check_optimizer(job, build_model(job)[0])


def test_numbers_of_groups_go_out_and_in() -> None:
    def made(groups: int) -> Any:
        parts = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(groups)]
        return note_groups(optimizers.Keeps(parts, lr=0.1))

    one, other = made(2), made(2)
    assert read_numbers(one) == {}
    for group in one.param_groups:
        group |= {"k": 3, "lr": 7.0, "weight": math.inf, "d": torch.tensor(0.1)}
    saved = json.loads(json.dumps(read_numbers(one), allow_nan=False))
    put_numbers(other, saved)
    for group in other.param_groups:
        assert (group["k"], group["lr"], group["weight"]) == (3, 0.1, math.inf)
        assert torch.equal(group["d"], torch.tensor(0.1))
    put_numbers(made(3), saved)  # all groups have the same
    saved["groups"][0]["k"] = 4
    with pytest.raises(JobError, match="2 parameter groups, which differ, and here are 3"):
        put_numbers(made(3), saved)


def test_the_mean_of_replicas() -> None:
    def merged(key: str, *values: list[float], weights: Any = None) -> list[float]:
        replicas = [[Piece("a", key, (len(v),), torch.tensor(v))] for v in values]
        weights = weights or [1 / len(values)] * len(values)
        (piece,) = merged_pieces(replicas, weights, 0, 1)
        found: list[float] = piece.tensor.tolist()
        return found

    odd = [0.1, -0.0, math.inf, -math.inf, 1e-45, 3.3]
    alike = torch.tensor(merged("weight", odd, odd, odd, weights=[0.2, 0.3, 0.5]))
    assert alike.view(torch.int32).equal(torch.tensor(odd).view(torch.int32))
    assert merged("weight", [1.0, math.inf], [2.0, 3.0], weights=[0.25, 0.75]) == [1.75, math.inf]
    assert merged("weight", [1.0], [math.inf], weights=[1.0, 0.0]) == [math.inf]
    assert merged("step", [3.0], [5.0]) == [3.0]
    assert math.isnan(merged("weight", [math.inf], [-math.inf])[0])
    less = [[Piece("a", "exp_avg", (1,), torch.tensor([3.0]))], []]
    assert merged_pieces(less, [0.5, 0.5], 0, 1)[0].tensor.tolist() == [1.5]
