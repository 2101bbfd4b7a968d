"""The gallery of known failures: its rows, how it reads a comparison, the gate, the reports."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import hybrid
from benchmarks import known_failures
from benchmarks.gallery import running
from benchmarks.gallery.rows import ROWS, Row
from benchmarks.gallery.running import Outcome, read_outcome
from hybrid.job.errors import Unsupported
from hybrid.job.known_bad import check_release
from hybrid.records import Comparison, Difference, Parity, Receipt, Record, from_dict, to_dict
from hybrid.strategies import registry
from tests.conftest import ROOT, small_job

FIRST = Difference(0, "grad_norm", 4.0, 1.0, "gradients 4 times too large")
DISAGREE = "rank 1 has gradient norm 0.4, rank 0 has 0.3: what all ranks share was not reduced"
REFUSED = "rank 0: receipt refused: fsdp was asked for; not so: every parameter is a DTensor"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_each_row_is_a_job_that_loads(row: Row) -> None:
    job = hybrid.load_job(row.job)
    assert not job.warnings() and registry.get(row.strategy)
    assert row.release or row.planted, "nothing fails in it"
    assert row.good != row.release or row.planted, "its control has the failure too"


def test_the_gallery_is_a_gallery() -> None:
    assert len(ROWS) >= 8 and len({row.name for row in ROWS}) == len(ROWS)
    shown = {row.shown_release for row in ROWS}
    wanted = {f"DeepSpeed 0.{n}" for n in ("18.2", "17.6", "19.2", "18.9", "18.5", "19.8")}
    assert shown >= wanted | {"Accelerate", "MKL"}


def comparison(parity: Parity | None, record: Record | None = None) -> dict[str, Any]:
    """The object of a compare.json with one strategy."""
    found = record or Record("s", "ok", receipt=Receipt(True, {}))
    verdicts = {} if parity is None else {"s": parity}
    return to_dict(Comparison({}, {}, "single", {"s": found}, verdicts, False))


@pytest.mark.parametrize(
    ("found", "alarm", "place", "problem"),
    [
        (comparison(Parity(True, 0, 0, {}, state="equal")), False, (None, None), None),
        (
            comparison(Parity(False, 1, 1, {}, FIRST, state="not_equal")),
            True,
            (0, "grad_norm"),
            None,
        ),
        (
            comparison(Parity(False, None, None, {}), Record("s", "failed", REFUSED)),
            True,
            (None, "receipt"),
            None,
        ),
        (
            comparison(
                Parity(False, None, None, {}), Record("s", "failed", f"{DISAGREE} (in step 2)")
            ),
            True,
            (2, "grad_norm"),
            None,
        ),
        (
            comparison(Parity(False, None, None, {}), Record("s", "failed", "rank 1: SIGKILL")),
            False,
            (None, None),
            "failed: rank 1: SIGKILL",
        ),
        (
            comparison(None, Record("s", "not_possible", "it refuses")),
            False,
            (None, None),
            "not_possible: it refuses",
        ),
        (comparison(Parity(False, None, None, {})), False, (None, None), "not_compared"),
        (
            comparison(Parity(False, 1, 1, {}, FIRST, state="not_equal"))
            | {"reference_fault": {"step": 0}},
            False,
            (None, None),
            "the reference does not repeat",
        ),
    ],
)
def test_a_crash_is_no_alarm(
    found: dict[str, Any], alarm: bool, place: tuple[Any, Any], problem: str | None
) -> None:
    from_dict(Comparison, found | {"reference_fault": None})
    outcome = read_outcome(found, "s")
    assert outcome.alarm == alarm and (outcome.step, outcome.quantity) == place
    assert (outcome.problem is None) if problem is None else (problem in str(outcome.problem))


BAD = Outcome(True, 0, "grad_norm", 4.0, 1.0, "4 times too large: not divided by the number of")
QUIET = Outcome(False)


@pytest.mark.parametrize(
    ("bad", "good", "caught", "control_ok"),
    [
        (BAD, QUIET, True, True),
        (BAD._replace(step=1), QUIET, False, True),
        (BAD._replace(quantity="loss"), QUIET, False, True),
        (BAD._replace(likely_cause="other samples"), QUIET, False, True),
        (QUIET, QUIET, False, True),
        (BAD, BAD, True, False),
        (BAD, Outcome(False, problem="it crashed"), True, False),
    ],
)
def test_a_row_is_caught_in_its_place_alone(
    bad: Outcome,
    good: Outcome,
    caught: bool,
    control_ok: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    row = Row("n", "pipeline", "r", 0, "grad_norm", release="0.1", good="0.2", cause="4 times too")

    def run(row: Row, release: str, planted: None, out: Path, cache: Path) -> Outcome:
        return {"0.1": bad, "0.2": good}[release]

    monkeypatch.setattr(known_failures, "run_row", run)
    found = known_failures.check_row(row, tmp_path, tmp_path)
    assert (found["caught"], found["control_ok"]) == (caught, control_ok)
    promised = {"name", "release", "strategy", "caught", "step", "quantity"}
    assert promised | {"likely_cause", "control_ok"} <= found.keys()
    page = known_failures.as_markdown([found])
    assert f"{int(caught)} of 1 caught, {int(not control_ok)} alarms" in page
    json.dumps(found, allow_nan=False)


def test_the_flag_lifts_the_gate_and_stands_in_the_record(tmp_path: Path) -> None:
    for strategy, precision, release in (
        ("pipeline", "fp32", "0.19.2"),
        ("zero2", "fp32", "0.18.2"),
        ("zero1", "bf16", "0.18.9"),
    ):
        job = small_job(train__precision=precision, train__micro_batches=2)
        with pytest.raises(Unsupported, match=rf"deepspeed {release} .*DeepSpeed#\d+.*needed"):
            check_release(job, strategy, release)
        allowed = small_job(train__precision=precision, launch__allow_known_bad=True)
        (warning,) = check_release(allowed, strategy, release)
        assert "--allow-known-bad lets it run" in warning
        assert check_release(job, strategy, "0.19.8") == check_release(job, "ddp", release) == []
    assert check_release(small_job(train__micro_batches=1), "zero2", "0.18.2") == []
    for allow in (False, True):
        job = small_job(train__steps=1, launch__allow_known_bad=allow)
        assert hybrid.train(job, "single").environment["known_bad_allowed"] is allow


@pytest.mark.slow
def test_the_command_catches_a_failure_of_the_installed_release(tmp_path: Path) -> None:
    (row,) = (row for row in ROWS if "8068" in row.report)
    outcome = running.run_row(row, None, None, tmp_path, tmp_path / "releases")
    assert outcome.problem is None and outcome.alarm, outcome
    assert (outcome.step, outcome.quantity) == (row.step, row.quantity)
    assert outcome.known_bad_allowed is True


def test_the_workflow_gives_the_command_what_it_knows() -> None:
    workflow = yaml.safe_load((ROOT / "launch" / "ci" / "known_failures.yml").read_text())
    lines = [step["run"] for step in workflow["jobs"]["gallery"]["steps"] if "run" in step]
    start = "python -m benchmarks.known_failures "
    ours = [line.removeprefix(start).split() for line in lines if line.startswith(start)]
    parsed = [known_failures.make_parser().parse_args(words) for words in ours]
    assert [arguments.release for arguments in parsed] == [None, "newest"]


def test_the_recorded_page_has_every_row() -> None:
    page = (ROOT / "benchmarks" / "known_failures.md").read_text()
    assert [row.name for row in ROWS if f"| {row.name} | {row.shown_release} |" not in page] == []
    assert f"{len(ROWS)} of {len(ROWS)} caught, 0 alarms without a failure." in page


PAGE = (ROOT / "docs" / "upstream.md").read_text()
SCRIPTS = sorted((ROOT / "docs" / "upstream").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_a_report_needs_nothing_of_this_project(script: Path) -> None:
    tree = ast.parse(script.read_text())
    roots = {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    roots |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {"hybrid", "tests", "benchmarks"} & {name.partition(".")[0] for name in roots}
    assert f"`docs/upstream/{script.name}`" in PAGE
