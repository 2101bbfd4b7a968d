"""Every run goes through one door: the same files, warnings and status, whoever starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid import records
from hybrid.engines.schedule import learning_rate
from hybrid.job.errors import JobError, RunError, Unsupported
from hybrid.job.file import to_dict
from hybrid.job.known_bad import check_release
from hybrid.measure import traffic
from hybrid.models.mlp import mlp
from tests.conftest import ROOT, SMALL, hybrid_command, small_job
from tests.test_failures import start_train, wait_for_steps

RELU = {"sizes": [32, 24, 16, 12, 10], "activation": "relu"}
WILD = {"optimizer__lr": 1e30, "model__options": RELU}  # its loss is soon not finite
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def status(out: Path) -> tuple[str, str]:
    """What the record in a run's folder says of it."""
    found = json.loads((out / "record.json").read_text())
    return found["status"], str(found["reason"])


def torchrun(
    job: Any, out: Path, *options: str, fault: str = "nothing", more: Sequence[str] = ()
) -> Any:
    """`hybrid train` of a job under torchrun with two ranks, with a fault of tests/failing.py."""
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / "asked.json"
    records.write(to_dict(job), file)
    program = [str(ROOT / "tests" / "failing.py"), fault]
    words = ["train", str(file), "--strategy", "ddp", "--out", str(out), *more]
    return subprocess.run(
        [*TORCHRUN, *options, *program, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


def test_another_launcher_s_run_has_the_files_and_warnings_of_our_own(tmp_path: Path) -> None:
    """`global_batch = 24` in five micro-batches pads rows: a pipeline would be warned of it."""
    job = small_job(optimizer__eps=1e-6, train__steps=2)
    theirs = torchrun(job, tmp_path / "theirs" / "run")
    records.write(to_dict(job), tmp_path / "asked.json")
    own = ["train", str(tmp_path / "asked.json"), "--strategy", "ddp", "--nproc", "2"]
    ours = hybrid_command(*own, "--out", str(tmp_path / "ours"))
    assert theirs.returncode == ours.returncode == 0, theirs.stderr + ours.stderr
    said = "hybrid: warning: optimizer.eps has no effect with optimizer.name = 'sgd'"
    assert [run.stderr.count(said) for run in (theirs, ours)] == [1, 1]
    files = [
        sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
        for out in (tmp_path / "theirs" / "run", tmp_path / "ours")
    ]
    assert files[0] == files[1]
    assert {"job.json", "record.json", "steps.jsonl"} < set(files[0])
    assert hybrid.load_job(tmp_path / "theirs" / "run" / "job.json") == job


def test_another_launcher_s_ranks_refuse_what_our_own_would(tmp_path: Path) -> None:
    """Only the try-out finds it, which rank 0 makes; every rank ends with it, one line is said."""
    job = small_job(model={"name": "tests.test_one_door:two_cuts"})
    done = torchrun(job, tmp_path / "run")
    assert done.returncode, done.stdout
    words = "model.name = 'tests.test_one_door:two_cuts': must return (layers, loss), "
    words += "(module, loss), or a module that returns its own loss; it returned a list"
    assert [line for line in done.stderr.splitlines() if line == f"hybrid: {words}"]
    assert status(tmp_path / "run") == ("failed", words)


def two_cuts() -> list[Any]:
    """A model function that returns what it must not."""
    return []


@pytest.mark.parametrize("alone", [True, False])
def test_nothing_of_an_earlier_run_outlives_a_failed_one(alone: bool, tmp_path: Path) -> None:
    hybrid.train(small_job(), "single", tmp_path)
    assert status(tmp_path) == ("ok", "None")
    assert (tmp_path / "checkpoints" / "final" / "model.safetensors").exists()
    if alone:
        with pytest.raises(RunError, match="not finite"):
            hybrid.train(small_job(**WILD), "single", tmp_path)
    else:
        records.write(to_dict(small_job(**WILD)), tmp_path / "asked.json")
        words = ["train", str(tmp_path / "asked.json"), "--strategy", "ddp", "--nproc", "2"]
        assert hybrid_command(*words, "--out", str(tmp_path)).returncode == 1
    found, reason = status(tmp_path)
    assert found == "failed" and "not finite" in reason
    assert not (tmp_path / "checkpoints").exists()


def test_a_record_says_that_its_run_is_running(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start_train(out, "ddp", steps=100_000)
    try:
        wait_for_steps(out, 2)
        assert status(out)[0] == "running"
    finally:
        run.terminate()
        run.communicate(timeout=30)
    assert status(out) == ("failed", "interrupted")


@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1"])
def test_an_engine_of_ones_own_loop_gives_accelerates_variables_back(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("FSDP_VERSION", "2")
    before = dict(os.environ)
    engine = hybrid.open_engine(small_job(), strategy, *mlp(**SMALL["model"]["options"]))
    assert "FSDP_VERSION" not in os.environ
    engine.close()
    hybrid.cleanup()
    assert os.environ == before


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_rate_past_the_last_step_stays_at_its_lowest(name: str) -> None:
    schedule = {"name": name, "warmup_steps": 2, "min_lr": 0.01}
    job = small_job(schedule=schedule, train__steps=10)
    assert learning_rate(job, 9) > 0.01
    assert [learning_rate(job, step) for step in (10, 11, 500)] == pytest.approx([0.01] * 3)


def test_a_release_candidate_of_deepspeed_is_compared_like_any_release() -> None:
    for fine in ("0.19.3", "0.20.0rc1", "0.19.9+cpu", "0.19.3.post1"):
        assert check_release(small_job(), "pipeline", fine) == []
    for wrong in ("0.19.3rc1", "0.19.2", "0.18.9.dev4"):
        with pytest.raises(Unsupported, match=r"wrong gradients.*0\.19\.3 or later"):
            check_release(small_job(), "2d", wrong)


def test_a_collective_that_the_counter_does_not_know_is_not_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {name: m for name, m in traffic._MEANINGS.items() if name not in ("allreduce", "all")}
    monkeypatch.setattr(traffic, "_MEANINGS", known)
    record = hybrid.train(small_job(), "ddp")
    assert record.comm and record.comm.not_counted == ["c10d::allreduce_"]
    assert "all_reduce" not in record.comm.by_op
    said = "hybrid: warning: ddp: c10d::allreduce_ is not counted: its bytes are not in the figures"
    assert said not in capsys.readouterr().err  # a run without a folder writes and prints nothing


def test_a_job_that_is_refused_leaves_what_there_is(tmp_path: Path) -> None:
    hybrid.train(small_job(), "single", tmp_path)
    with pytest.raises(JobError):
        hybrid.compare(small_job(model__options={"sizes": "no"}), ["single"], out=tmp_path.parent)
    assert status(tmp_path) == ("ok", "None")
