"""Steps that go wrong: stopped with what is to blame, skipped, or rolled back; all ranks alike."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hybrid
from hybrid.comparison.differences import relative
from hybrid.data.batches import BatchPlan
from hybrid.job.errors import JobError, RunFailed
from hybrid.records import Record
from hybrid.training.progress import Watcher
from hybrid.training.run import launch
from tests.conftest import small_job

SIZE, BATCH, RANKS = 61, 13, 4
SKIP = {"non_finite": "skip", "on_spike": "skip", "spike_factor": 50.0, "window": 1}
BASE: dict[str, Any] = {
    "model": {"name": "tests.guarded:brittle"},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "train": {"global_batch": BATCH, "micro_batches": 2, "steps": 5, "clip_norm": 1.0},
    "strategy": {"local_sgd": {"sync_every": 2}, "2d": {"zero_stage": 0}},
}


def plan(shares: int = RANKS, size: int = SIZE, batch: int = BATCH) -> BatchPlan:
    return BatchPlan(size, batch, shares, 2, 0)


def guarded(bad: list[int], kind: str, **changes: Any) -> hybrid.Job:
    """The job with these samples bad; it skips such steps unless `guard` says otherwise."""
    options = {"bad": bad, "kind": kind, **changes.pop("data", {})}
    data = {"data": {"name": "tests.guarded:marked", "options": options}}
    overrides = {k.replace("__", "."): v for k, v in {"guard": SKIP, **changes}.items()}
    return hybrid.load_job({**BASE, **data}, overrides)


def run(job: hybrid.Job, strategy: str, out: Path, resume: Path | None = None) -> Record:
    alone = strategy == "single" or job.strategy.local_sgd.emulate_replicas
    return launch(job, strategy, 1 if alone else RANKS, out, Watcher(), resume=resume)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / "final" / "model.safetensors")


def apart(run: tuple[Record, Path], reference: tuple[Record, Path]) -> tuple[float, float]:
    """Greatest relative difference in a loss, and in the weights."""
    pairs = list(zip(run[0].steps, reference[0].steps, strict=True))
    assert all(a.sample_digest == b.sample_digest for a, b in pairs)
    assert [a.skipped for a, _ in pairs] == [b.skipped for _, b in pairs]
    mine, theirs = weights(run[1]), weights(reference[1])
    away = [float((mine[n] - t).abs().max() / t.abs().max()) for n, t in theirs.items()]
    return max(relative(a.loss, b.loss) for a, b in pairs), max(away)


# Parity, with a step that is skipped.


@pytest.fixture(scope="module")
def bad_step() -> int:
    return random.Random("a step").randrange(1, 4)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, bad_step: int) -> dict[str, Any]:
    """Runs of one process in which a drawn step is bad for each reason."""
    found = {}
    for kind in ("layer", "gradient", "spike"):
        out = tmp_path_factory.mktemp(kind)
        sample = random.Random(kind).choice(plan().batch(bad_step))
        record = run(guarded([sample], kind), "single", out)
        assert [step.skipped for step in record.steps] == [i == bad_step for i in range(5)]
        assert math.isfinite(record.steps[bad_step].loss) == (kind != "layer")
        assert record.eval and math.isfinite(record.eval.loss)
        found[kind] = (record, out, sample)
    return found


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("ddp", "spike"),
        ("fsdp", "gradient"),
        ("zero1", "spike"),
        ("zero2", "layer"),
        ("zero3", "gradient"),
        ("pipeline", "spike"),
        ("2d", "layer"),
    ],
)
def test_a_skipped_step_is_the_same_under_every_strategy(
    strategy: str, kind: str, reference: dict[str, Any], bad_step: int, tmp_path: Path
) -> None:
    record, out, sample = reference[kind]
    parallel = {"parallel": {"pp": 2, "dp": 2}} if strategy == "2d" else {}
    own = run(guarded([sample], kind, **parallel), strategy, tmp_path)
    loss, weight = apart((own, tmp_path), (record, out))
    assert loss <= 1e-6 and weight <= 1e-5
    assert own.steps[bad_step].grad_norm is None
    (line,) = own.warnings
    assert line.startswith(f"step {bad_step}: loss ") and line.endswith("; no update was made")
    for text in (tmp_path / "steps.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON


def test_replicas_decide_together(tmp_path: Path) -> None:
    """A step is bad on one rank alone, in its loss; no replica makes it, and merges weigh alike."""
    found = {}
    sample = plan().micro_batch_ids(2, 1)[1][0]  # of rank 1
    for name, emulated in (("ranks", None), ("one process", RANKS)):
        local = {"sync_every": 2} | ({"emulate_replicas": emulated} if emulated else {})
        job = guarded([sample], "layer", strategy={"local_sgd": local})
        found[name] = run(job, "local_sgd", tmp_path / name), tmp_path / name
    loss, weight = apart(found["ranks"], found["one process"])
    assert loss <= 1e-6 and weight <= 1e-5
    assert found["ranks"][0].steps[2].skipped
    (line,) = found["ranks"][0].warnings
    assert line == "step 2: loss nan of rank 1: not finite; no update was made"


def test_a_guard_that_looks_at_its_own_rank_alone_is_caught(
    reference: dict[str, Any], tmp_path: Path
) -> None:
    record, _, sample = reference["spike"]
    job = guarded([sample], "spike", model__options={"alone": True})
    try:
        own = run(job, "ddp", tmp_path)
    except RunFailed:
        return
    ours = [step.loss for step in own.steps]
    theirs = [step.loss for step in record.steps]
    assert max(map(relative, ours, theirs)) > 1e-3


# What is to blame.


@pytest.mark.parametrize(
    ("strategy", "kind", "where"),
    [
        ("ddp", "gradient", "layer 0: the gradient of its output is not finite"),
        ("fsdp", "layer", "layer 3: its output is not finite"),
        ("zero3", "layer", "layer 3: its output is not finite"),
        ("pipeline", "layer", "layer 3: its output is not finite"),
        ("2d", "loss", "the loss: every layer's output is finite"),
        ("local_sgd", "gradient", "layer 0: the gradient of its output is not finite"),
        ("ddp", "spike", "has the greatest loss, "),
    ],
)
def test_a_run_that_stops_names_step_rank_sample_and_layer(
    strategy: str, kind: str, where: str, tmp_path: Path
) -> None:
    draw = random.Random(strategy + kind)
    columns = {"pipeline": 1, "2d": 2}.get(strategy, RANKS)
    step, share, shares = draw.randrange(1, 4), draw.randrange(columns), plan(columns)
    sample = draw.choice([i for ids in shares.micro_batch_ids(step, share) for i in ids])
    parallel = {"parallel": {"pp": 2, "dp": 2}} if strategy == "2d" else {}
    policy = {"spike_factor": 50.0, "window": 1}
    job = guarded([sample], kind, guard=policy, **parallel)
    rank = {"pipeline": 1, "2d": 2 + share}.get(strategy, share)  # where it shows first
    with pytest.raises(RunFailed) as raised:
        run(job, strategy, tmp_path)
    words = str(raised.value)
    assert f"step {step}: loss " in words, words
    assert f"; rank {rank}, sample {sample} of the train set" in words and where in words, words


def test_a_sample_that_is_not_finite_itself_is_told(tmp_path: Path) -> None:
    job = guarded([plan().batch(1)[3]], "nan", guard={})
    with pytest.raises(RunFailed, match=r"layer 0: its output is not finite; nor is the sample"):
        run(job, "single", tmp_path)


# Going back.


def test_rolled_back_steps_count_as_skipped(tmp_path: Path) -> None:
    """The end is that of a run in which the steps since the checkpoint were skipped, to the bit."""
    back = {"non_finite": "roll_back"}
    settings = {"checkpoint": {"every": 2}, "data": {"size": 100}, "train__steps": 6}
    plans = plan(size=100)
    first, bad = plans.batch(2)[4], plans.batch(3)[4]
    gone = run(guarded([bad], "layer", guard=back, **settings), "ddp", tmp_path / "back")
    told = [(step.skipped, step.rolled_back_to) for step in gone.steps]
    assert told == [(False, None)] * 3 + [(True, 2)] + [(False, None)] * 2
    assert gone.warnings == [gone.warnings[0]] and "back to the state after 2" in gone.warnings[0]
    both = run(guarded([first, bad], "layer", **settings), "ddp", tmp_path / "skip")
    assert [step.skipped for step in both.steps] == [False, False, True, True, False, False]
    assert gone.checkpoint and gone.checkpoint == both.checkpoint
    # A run that goes on from before that step meets it again, and one from after it does not.
    for step in (2, 4):
        saved = tmp_path / "back" / "checkpoints" / f"step-{step:08d}"
        job = guarded([bad], "layer", guard=back, **settings)
        again = run(job, "ddp", tmp_path / str(step), resume=saved)
        assert again.checkpoint == gone.checkpoint


def test_there_must_be_something_to_go_back_to(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"guard: on_spike = 'roll_back' goes back to a checkpoint"):
        small_job(guard={"on_spike": "roll_back"})
    job = guarded(
        [plan().batch(1)[0]], "layer", guard={"non_finite": "roll_back"}, checkpoint={"every": 3}
    )
    with pytest.raises(RunFailed, match=r"step 1: loss nan: not finite; .*no checkpoint yet"):
        run(job, "single", tmp_path)


# What a bad step leaves.


def test_buffers_are_what_they_were(tmp_path: Path) -> None:
    """Running statistics that a bad forward pass poisoned come back, and stay those of rank 0."""
    large = {"size": 200, "bad": [plan(size=200, batch=32).batch(0)[9]]}
    settings = {"model__options": {"norm": True}, "train__global_batch": 32, "data": large}
    settings |= {"strategy": {"single": {"emulate_ranks": 4}}}
    settings |= {"optimizer": {"name": "sgd", "lr": 0.01}}
    found = {}
    for strategy in ("single", "ddp", "2d"):
        parallel = {"parallel": {"pp": 2, "dp": 2}} if strategy == "2d" else {}
        out = tmp_path / strategy
        found[strategy] = run(guarded([], "layer", **settings, **parallel), strategy, out), out
        assert all(bool(t.isfinite().all()) for t in weights(out).values())
        assert int(weights(out)["5.num_batches_tracked"]) == 2 * 4  # two micro-batches a step
    loss, weight = apart(found["ddp"], found["single"])
    assert loss <= 1e-6 and weight <= 1e-5
