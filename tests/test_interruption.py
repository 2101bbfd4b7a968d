"""A comparison interrupts its runs and resumes them, and goes on with runs that were stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest

import hybrid
from benchmarks.checkpoint_pair_page import markdown
from benchmarks.checkpoint_pair_runs import Pair, Pairs, check
from benchmarks.checkpoint_pairs import draw_pairs
from hybrid import records, report
from hybrid.checkpoint.manifest import read_manifest
from hybrid.comparison import runs as making
from hybrid.comparison.causes import Facts, likely_cause
from hybrid.comparison.differences import Found, Run, find_lost_step
from hybrid.comparison.previous import read_id
from hybrid.comparison.verdict import judge_run
from hybrid.job.errors import Failure, JobError, RunFailed
from hybrid.records import Comparison, Parity, Record, ResumedFrom, StepRecord
from hybrid.strategies.registry import NAMES as ALL
from tests.conftest import hybrid_command, small_job
from tests.launches import NAMES, Launches, compare, launches, states

__all__ = ["launches"]  # a fixture

STOPPED, HASH = 4, "5" * 64


def make_job(**changes: Any) -> Any:
    """A model with tied weights and dropout, whose batch of 9 does not divide among 4 ranks."""
    options = {"num_layers": 5, "width": 24, "num_heads": 3, "context": 13, "vocab_size": 101}
    wanted = {
        "model": {"name": "gpt", "options": options | {"dropout": 0.1, "tied": True}},
        "data": {"name": "benchmarks.checkpoint_pair_runs:tokens"},
        "optimizer": {"name": "adamw", "lr": 0.003, "eps": 1e-4},
        "train": {"global_batch": 9, "micro_batches": 2, "steps": 7, "clip_norm": 1.0},
        "variant": {"keep": {"strategy": "fsdp", "reshard_after_forward": False}},
    }
    return hybrid.load_job(wanted, {key.replace("__", "."): v for key, v in changes.items()})


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """ddp and fsdp stopped after 4 steps on 4 ranks, and resumed as a variant of fsdp."""
    out = tmp_path_factory.mktemp("interrupted")
    how: Any = {"nproc": 4, "out": out, "interrupt": STOPPED, "resume_as": "keep"}
    return out, hybrid.compare(make_job(), ["ddp", "fsdp"], **how)


def test_each_run_is_stopped_and_resumed_and_equals_one_that_was_not(
    interrupted: tuple[Path, Comparison],
) -> None:
    out, result = interrupted
    assert states(result) == {"single": "equal", "ddp": "equal", "fsdp": "equal"} and result.ok
    assert result.strategies["single"].resumed_from is None
    for name in ("ddp", "fsdp"):
        run = result.strategies[name]
        assert (run.strategy, run.variant_of, run.world_size) == ("keep", "fsdp", 4)
        assert [step.step for step in run.steps] == list(range(7)) and run.resumed_from
        manifest = read_manifest(out / name / "checkpoints" / f"step-{STOPPED:08d}")
        assert manifest.values["strategy"] == name
        found = run.resumed_from.step, run.resumed_from.state_hash
        assert found == (STOPPED, manifest.state_hash)


def test_the_pages_say_so(interrupted: tuple[Path, Comparison]) -> None:
    _, result = interrupted
    text, page = report.markdown(result), report.html(result)
    assert "- ddp, fsdp: interrupted after step 4 and resumed as keep." in text
    assert text.count("| step 4 as keep |") == 2 and "keep is fsdp with" in text
    assert "ddp is fsdp" not in text
    said = "It was interrupted after step 4 and resumed as keep from {}/checkpoints/step-00000004"
    assert said.format("ddp") in page and said.format("fsdp") in page


def test_a_run_that_goes_on_otherwise_is_not_equal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its optimizer is another one: the loss after the first step from there on differs."""
    launch = making.launch

    def other(job: Any, name: str, *rest: Any, **how: Any) -> Record:
        if how.get("resume"):
            beta = job.optimizer.model_copy(update={"betas": [0.5, 0.9]})
            job = job.model_copy(update={"optimizer": beta})
        return launch(job, name, *rest, **how)

    monkeypatch.setattr(making, "launch", other)
    found = hybrid.compare(
        make_job(), ["ddp"], nproc=2, out=tmp_path, interrupt=STOPPED, resume_as=None
    )
    first = found.parity["ddp"].first_difference
    assert not found.ok and first is not None and first.step in (STOPPED, STOPPED + 1)
    assert "it begins where the run was resumed, after step 4" in str(first.likely_cause)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"interrupt": 6}, "--interrupt 6: the job has 6 steps; valid: 1 to 5"),
        ({"interrupt": 0}, "--interrupt 0: the job has 6 steps; valid: 1 to 5"),
        ({"interrupt": -1}, "--interrupt -1: the job has 6 steps"),
        ({"resume_as": "ddp"}, "--resume-as ddp: valid with --interrupt STEP"),
        ({"interrupt": 2, "resume_as": "nothing"}, "strategy = 'nothing': unknown; valid: "),
    ],
)
def test_what_cannot_be_interrupted(how: dict[str, Any], words: str, launches: Launches) -> None:
    with pytest.raises(JobError, match=f"^{words}"):
        compare(launches, **how)
    assert launches.made == []


def test_a_job_of_one_step_has_nothing_to_resume(launches: Launches) -> None:
    with pytest.raises(JobError, match="has 1 steps; valid: a job of 2 steps or more"):
        compare(launches, job=small_job(train__steps=1), interrupt=1)


def test_the_command_takes_both_options(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    records.write(make_job().model_dump(mode="json", by_alias=True, exclude_none=True), job)
    words = ["compare", str(job), "--strategies", "ddp", "--out", str(tmp_path / "out")]
    done = hybrid_command(*words, "--interrupt", "7", "--resume-as", "fsdp")
    assert done.returncode == 2 and "--interrupt 7: the job has 7 steps" in done.stderr


def test_what_mixes_two_algorithms_or_cannot_run_is_not_possible(launches: Launches) -> None:
    result = compare(launches, ["ddp", "local_sgd"], interrupt=2, resume_as="fsdp")
    found = result.strategies["local_sgd"]
    assert found.status == "not_possible" and "no run is the reference of both" in str(found.reason)
    assert "local_sgd computes something else" in str(found.reason)
    result = compare(launches, ["ddp"], interrupt=2, resume_as="2d")
    found = result.strategies["ddp"]
    assert found.status == "not_possible" and str(found.reason).startswith(
        "resumed as 2d: 2 stages"
    )


def test_the_reference_runs_through_and_the_others_in_two_parts(launches: Launches) -> None:
    assert compare(launches, interrupt=2).ok
    assert launches.made == ["single", *(name for name in NAMES for _ in range(2))]
    launches.made.clear()
    assert compare(launches, interrupt=2, resume=True).ok and launches.made == []
    with pytest.raises(
        JobError, match=r"--resume: interrupt\.step = 3, and the comparison in .* 2"
    ):
        compare(launches, interrupt=3, resume=True)
    with pytest.raises(JobError, match=r"--resume: interrupt\.step = .*, and the comparison"):
        compare(launches, resume=True)


def test_a_part_that_fails_is_a_failed_run(launches: Launches) -> None:
    wrong = RunFailed(Failure(0, "has no exp_avg of w", "", kind="job"))
    launches.ends["fsdp"], launches.only_resumed = wrong, True
    result = compare(launches, interrupt=2)
    assert result.strategies["fsdp"].status == "failed" and states(result)["ddp"] == "equal"
    assert result.strategies["fsdp"].reason == "has no exp_avg of w"


def test_controls_and_the_emulation_save_nothing(launches: Launches) -> None:
    job = small_job(checkpoint__every=2)
    assert compare(launches, ["ddp", "local_sgd"], job).ok
    every = {
        path.parent.name: json.loads(path.read_text())["checkpoint"].get("every")
        for path in launches.out.glob("*/job.json")
    }
    assert every == {"single": 2, "ddp": 2, "local_sgd": 2, "local_sgd_emulation": None}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A comparison whose ddp was stopped after step 4, with checkpoints of steps 2 and 4."""
    out, job = tmp_path_factory.mktemp("stopped") / "a", make_job(checkpoint__every=2)
    assert hybrid.compare(job, ["ddp"], nproc=2, out=out).ok
    for path in (out / "ddp" / "checkpoints").glob("*"):
        if path.name not in ("step-00000002", "step-00000004"):
            shutil.rmtree(path)
    lines = (out / "ddp" / "steps.jsonl").read_text().splitlines(keepends=True)
    (out / "ddp" / "steps.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    mark = read_id(out)
    records.write(Record("ddp", "running", comparison=mark), out / "ddp" / "record.json")
    return out, job


@pytest.mark.parametrize(
    ("harm", "step"),
    [
        ("", 4),
        ("checkpoints/step-00000004/rank00001.safetensors", 2),
        ("checkpoints", None),
        ("steps.jsonl", None),
    ],
)
def test_a_stopped_run_goes_on_from_its_newest_good_checkpoint(
    harm: str, step: int | None, stopped: tuple[Path, Any], tmp_path: Path
) -> None:
    source, job = stopped
    out = tmp_path / "a"
    shutil.copytree(source, out)
    harmed = out / "ddp" / harm if harm else None
    if harmed and harmed.is_dir():
        shutil.rmtree(harmed)
    elif harmed:
        harmed.write_bytes(harmed.read_bytes()[:-1] if step else b"")
    before = (out / "single" / "record.json").stat().st_mtime_ns
    result = hybrid.compare(job, ["ddp"], nproc=2, out=out, resume=True)
    run = result.strategies["ddp"]
    assert (run.resumed_from and run.resumed_from.step) == step and result.ok
    assert [one.step for one in run.steps] == list(range(7)), "all steps are judged"
    assert (out / "single" / "record.json").stat().st_mtime_ns == before, "it ran again"


def steps(*numbers: int) -> list[StepRecord]:
    return [StepRecord(n, 2.0, 1.0, 0.1, 24, "0a") for n in numbers]


@pytest.mark.parametrize(
    ("kept", "lost"), [((0, 1, 2, 3), None), ((2, 3), 0), ((0, 2, 3), 1), ((), 0), ((0,), 1)]
)
def test_a_record_without_some_of_its_steps_is_not_compared(
    kept: tuple[int, ...], lost: int | None
) -> None:
    resumed = ResumedFrom("out/ddp/checkpoints/step-00000002", 2, HASH)
    layout = {"pp": 1, "dp": 1, "replicate": 1, "shard": 1}
    whole = Record("single", "ok", steps=steps(0, 1, 2, 3), layout=layout)
    late = dataclasses.replace(whole, strategy="ddp", steps=steps(*kept), resumed_from=resumed)
    weights = {"w": numpy.ones(3, dtype="float32")}
    for runs, name in (({"single": whole, "ddp": late}, "ddp"), ({"single": late}, "single")):
        found = judge_run(
            small_job(), name, runs, "single", {}, lambda n, known=runs: Run(known[n], weights)
        )
        assert isinstance(found, Parity)
        assert found.state == ("equal" if lost is None else "not_compared")
        assert lost is None or f"lacks step {lost}: the steps.jsonl" in str(found.reason)
    assert (find_lost_step(late) is None) == (lost is None)


@pytest.mark.parametrize(("step", "named"), [(1, False), (2, True), (3, True), (None, False)])
def test_a_difference_that_begins_at_the_resumption_is_named(step: int | None, named: bool) -> None:
    run = Record("ddp", "ok", steps=steps(0, 1, 2, 3), resumed_from=ResumedFrom("x", 2, HASH))
    cause = likely_cause(run, run, Found(step, "loss", 2.1, 2.0, 0.05), Facts())
    assert ("begins where the run was resumed" in str(cause)) == named


def test_the_campaign_draws_all_ordered_pairs() -> None:
    worlds = {name: [1] if name == "single" else [4] if name == "2d" else [2, 3, 4] for name in ALL}
    pairs = draw_pairs(worlds, "fp32", 0)
    assert {(p.source, p.target) for p in pairs} == {(a, b) for a in ALL for b in ALL}
    assert max(Counter(p.title for p in pairs).values()) == 1
    assert all(any(p.alike and p.source == name for p in pairs) for name in ALL)
    assert {p.source_ranks for p in pairs if p.source == "zero3"} <= {2, 3, 4}
    assert pairs == draw_pairs(worlds, "fp32", 0) != draw_pairs(worlds, "fp32", 1)
    assert all(p.mixes == ("local_sgd" in (p.source, p.target)) for p in pairs if not p.alike)


@pytest.mark.campaign
def test_the_campaign_on_three_pairs(tmp_path: Path) -> None:
    pairs = Pairs(check("fp32"), tmp_path)
    asked = [Pair("fsdp", 3, *target, "fp32") for target in (("fsdp", 3), ("ddp", 2))]
    rows = [pairs.run(pair) for pair in asked]
    assert [row["outcome"] for row in rows] == ["holds", "holds"], rows
    assert rows[0]["bits_same"] is True and rows[0]["next_steps"] == 0 < rows[1]["next_steps"]
    assert not (tmp_path / asked[0].title).exists(), "only folders of pairs that do not hold stay"
    manifest = tmp_path / "fsdp_3" / "checkpoints" / "step-00000006" / "manifest.json"
    pairs.failed["zero1_2"] = RunFailed(Failure(1, "no such state", "", kind="unsupported"))
    rows.append(pairs.run(Pair("zero1", 2, "ddp", 2, "fp32")))
    assert rows[-1]["outcome"] == "not possible" and rows[-1]["reason"] == "no such state"
    text = markdown(rows, ["fsdp", "ddp", "zero1"], "python", "a machine")
    assert "| fsdp on 3 | 3: = | 2: " in text and "zero1_2_to_ddp_2_fp32: not possible: no" in text
    manifest.write_text(manifest.read_text().replace('"step":6', '"step":7'))
    broken = pairs.run(Pair("fsdp", 3, "ddp", 3, "fp32"))
    assert broken["outcome"] == "broken" and "manifest.json" in broken["reason"], broken
