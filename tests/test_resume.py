"""A comparison that is interrupted leaves what it has; resumed, it makes only what is missing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid import records
from hybrid.job.errors import Failure, JobError, RunFailed
from hybrid.job.file import to_dict
from hybrid.measure.machine import describe_machine
from hybrid.records import Comparison
from tests.conftest import ROOT, hybrid_command, small_job
from tests.launches import NAMES, PROXY, Launches, compare, launches, states, written
from tests.test_failures import wait_for_steps

__all__ = ["launches"]  # a fixture


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_comparison_leaves_what_it_has(
    error: BaseException, launches: Launches
) -> None:
    launches.ends["fsdp"] = error
    with pytest.raises(type(error)):
        compare(launches, [*NAMES, "2d"])
    result = written(launches)
    assert launches.made == ["single", "ddp", "fsdp"] and not result.ok
    found = {"single": "equal", "ddp": "equal", "fsdp": "not_compared", "zero1": "not_compared"}
    assert states(result) == found
    assert {result.parity[n].reason for n in ("fsdp", "zero1")} == {"interrupted"}
    assert result.strategies["zero1"].reason == "interrupted"
    assert result.strategies["2d"].status == "not_possible"


def test_a_comparison_that_is_interrupted_while_it_is_judged(launches: Launches) -> None:
    launches.ends["local_sgd_emulation"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare(launches, ["local_sgd", "ddp"])
    result = written(launches)
    assert states(result) == {"single": "equal", "local_sgd": "not_compared", "ddp": "equal"}
    assert result.parity["local_sgd"].reason == "interrupted"


def test_a_proxy_that_is_interrupted(launches: Launches) -> None:
    launches.ends["proxy/ddp"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare(launches, job=small_job(proxy=PROXY))
    assert set(states(written(launches)).values()) == {"not_compared"}
    launches.ends.clear()
    launches.made.clear()
    assert compare(launches, job=small_job(proxy=PROXY), resume=True).ok
    assert launches.made == ["proxy/ddp", "proxy/fsdp", "proxy/zero1", *NAMES]


def test_a_resumed_comparison_makes_only_what_is_missing(launches: Launches) -> None:
    launches.ends |= {"ddp": RunFailed(Failure(0, "the sky fell", "")), "zero1": SystemExit(143)}
    names = ["local_sgd", *NAMES]
    with pytest.raises(SystemExit):
        compare(launches, names)
    launches.ends.clear()
    launches.made.clear()
    result = compare(launches, names, resume=True)
    assert result.ok and list(result.strategies) == ["single", *names]
    assert launches.made == ["ddp", "zero1", "local_sgd_emulation"]
    launches.made.clear()
    assert compare(launches, [*names, "zero2"], resume=True).ok and launches.made == ["zero2"]
    launches.made.clear()
    assert compare(launches, names).ok and len(launches.made) == 6, "without --resume all run"


def test_what_another_comparison_left_is_not_kept(launches: Launches) -> None:
    compare(launches, job=small_job(train__steps=5))
    launches.ends["ddp"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        compare(launches)
    assert states(written(launches))["fsdp"] == "not_compared"
    launches.ends.clear()
    launches.made.clear()
    assert compare(launches, resume=True).ok and launches.made == NAMES


def test_a_variant_may_be_added_and_a_run_must_be_whole(launches: Launches) -> None:
    compare(launches)
    (launches.out / "fsdp" / "checkpoints" / "final" / "model.safetensors").unlink()
    record = json.loads((launches.out / "zero1" / "record.json").read_text())
    record["environment"]["packages"]["torch"] = "1.0"
    (launches.out / "zero1" / "record.json").write_text(json.dumps(record))
    launches.made.clear()
    job = small_job(variant={"keep": {"strategy": "fsdp"}})
    assert compare(launches, [*NAMES, "keep"], job, resume=True).ok
    assert launches.made == ["fsdp", "zero1", "keep"]
    launches.made.clear()
    other = small_job(variant={"keep": {"strategy": "fsdp", "reshard_after_forward": False}})
    with pytest.raises(JobError, match=r"--resume: variant\.keep\.reshard_after_forward = False"):
        compare(launches, ["keep"], other, resume=True)
    assert launches.made == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"job": {"train__steps": 7}}, r"train\.steps = 7, and the comparison in .* has 6"),
        ({"job": {"strategy__fsdp": {"micro_batches": 3}}}, r"strategy\.fsdp\.micro_batches = 3"),
        ({"nproc": 3}, "nproc = 3, and the comparison in .* has 2"),
        ({"torch": "1.0"}, r"machine\.packages\.torch = .*, and the comparison in .* has '1\.0'"),
    ],
)
def test_another_comparison_is_not_resumed(
    change: dict[str, Any], words: str, launches: Launches
) -> None:
    compare(launches)
    before = (launches.out / "compare.json").read_text()
    described = json.loads((launches.out / "session.json").read_text())
    described["machine"]["packages"]["torch"] = change.get("torch", hybrid_torch())
    (launches.out / "session.json").write_text(json.dumps(described))
    launches.made.clear()
    job, nproc = small_job(**change.get("job", {})), change.get("nproc", 2)
    with pytest.raises(JobError, match=f"^--resume: {words}.*; valid: the same, or another --out"):
        hybrid.compare(job, NAMES, nproc=nproc, out=launches.out, resume=True)
    assert launches.made == [] and (launches.out / "compare.json").read_text() == before


def hybrid_torch() -> str:
    return str(describe_machine()["packages"]["torch"])


def start_compare(out: Path, steps: int) -> subprocess.Popen[str]:
    """`hybrid compare` of the small job under ddp, in the background."""
    out.mkdir(exist_ok=True)
    records.write(to_dict(small_job(train__steps=steps)), out / "small.json")
    command = ["compare", str(out / "small.json"), "--strategies", "ddp", "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-m", "hybrid", *command, "--nproc", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_the_command_ended_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = start_compare(out, steps=300)
    wait_for_steps(out / "ddp", 2)
    run.send_signal(signal.SIGTERM)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 143, stderr
    found = states(records.read(Comparison, out / "compare.json"))
    assert found == {"single": "equal", "ddp": "not_compared"}
    begun = (out / "single" / "record.json").stat().st_mtime_ns
    words = ["compare", str(out / "small.json"), "--strategies", "ddp", "--nproc", "2"]
    done = hybrid_command(*words, "--resume", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parity"]["ddp"]["state"] == "equal"
    assert (out / "single" / "record.json").stat().st_mtime_ns == begun, "it ran again"
    assert "single: step 300/300" in done.stderr and ", kept" in done.stderr


def test_resume_names_a_comparison(tmp_path: Path) -> None:
    job = str(ROOT / "launch" / "jobs" / "linear.toml")
    done = hybrid_command("compare", job, "--resume", str(tmp_path))
    assert done.returncode == 2 and "holds no comparison" in done.stderr
    done = hybrid_command("compare", job, "--resume", str(tmp_path), "--out", str(tmp_path / "x"))
    assert done.returncode == 2 and "--out" in done.stderr
