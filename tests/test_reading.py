"""The page on reading a comparison tells the truth: held against real comparisons and the code.

The comparisons run in this process, on one rank: one with faults planted, one that needs controls.
"""

from __future__ import annotations

import ast
import re
import shlex
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import hybrid
from hybrid import records
from hybrid.cli import app
from hybrid.comparison import session
from hybrid.comparison.controls import CONTROL_MICRO_BATCHES
from hybrid.comparison.differences import SAME_START, STEP_QUANTITIES
from hybrid.comparison.noise import SHARE_OF_NOISE
from hybrid.comparison.tolerances import EXACT_STEPS, HOOK_TOLERANCES, TOLERANCES, tolerance
from hybrid.job.errors import Failure, RunFailed, exit_status, first_line
from hybrid.job.file import load_job
from hybrid.measure.clock import WARMUP_STEPS
from hybrid.records import Comparison
from hybrid.report.costs import UNLIKE_STEPS
from hybrid.report.precision import KINDS
from hybrid.report.standing import STATES, standings
from hybrid.report.table import IN_80_COLUMNS, LEFT_TO_THE_FILES, make_headers
from hybrid.report.verdict import verdict
from hybrid.training import run
from tests import faulty
from tests.conftest import JOBS, ROOT, small_job
from tests.documents import flat, rows, spans
from tests.reading import PARITY, SOURCES, TEXT, find, section, strings


class Made(NamedTuple):
    """A comparison and its folder."""

    result: Comparison
    out: Path


def in_this_process(
    nproc: int, arguments: Sequence[str], out: Path, *rest: Any, **more: Any
) -> None:
    """`run_ranks` without processes: one rank, which fails as a rank of its own would."""
    assert nproc == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small layers: more are several times slower
    try:
        hybrid.train(load_job(Path(arguments[1]), []), arguments[3], out)
    except Exception as error:
        failure = Failure(0, f"{type(error).__name__}: {error}", "")
        raise RunFailed(failure) from None
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The page's own example: `ddp` forgets to divide, `fsdp` falls back, `2d` is not possible."""
    from hybrid.engines import accelerator
    from hybrid.engines.accelerated import AcceleratedEngine

    out = tmp_path_factory.mktemp("wrong") / "out" / "compare"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_ranks", in_this_process)
        patch.setattr(AcceleratedEngine, "_backward", AcceleratedEngine._backward)  # to undo it
        patch.setattr(accelerator, "_keep_fsdp", accelerator._keep_fsdp)
        faulty.not_divided_by_accumulation()
        faulty.fsdp_falls_back()
        job = hybrid.load_job(JOBS / "mlp.toml", {"train.epochs": 3})
        names = ["ddp", "local_sgd", "fsdp", "2d"]
        return Made(hybrid.compare(job, names, nproc=1, out=out), out)


@pytest.fixture(scope="module")
def excused(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`ddp` sums in another order, where rounding of weights needs controls to be tolerated."""
    out = tmp_path_factory.mktemp("excused")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_ranks", in_this_process)
        patch.setitem(EXACT_STEPS, "fp32", 0)
        patch.setitem(TOLERANCES, "fp32", {**FP32, "weights": 1e-12})
        job = small_job(train__steps=30, train__seed=1, strategy__ddp={"micro_batches": 5})
        return Made(hybrid.compare(job, ["ddp"], nproc=1, out=out), out)


FP32 = TOLERANCES["fp32"]


def test_the_worked_example_is_what_is_printed(wrong: Made) -> None:
    printed = flat(section("An example that is wrong").split("```text\n")[1].split("```")[0])
    shown = [h for h in make_headers(wrong.result) if h not in LEFT_TO_THE_FILES]
    heads = " ".join(IN_80_COLUMNS.get(head, head) for head in shown)
    assert printed.startswith("Not equal: ddp from step 0 (grad_norm); 2 of 3 strategies equal, 1")
    assert f"possible here. {heads} single reference 1" in printed
    said = verdict(wrong.result)
    assert wrong.result.best.fastest in ("single", "local_sgd")  # ddp is wrong
    told = re.escape(standings(wrong.result)["ddp"].problem)
    digits = re.sub(r"(\d\\\.\d{4})\d+", r"\1\\d+", told)  # ranks sum in another order
    assert digits != told and re.search(digits, printed), told
    assert "Equal: local_sgd computed what local_sgd_emulation did." in said.details


def test_the_refused_receipt_is_what_is_printed(wrong: Made) -> None:
    problem = standings(wrong.result)["fsdp"].problem
    at = problem.index("receipt refused")
    assert problem.startswith("fsdp failed: rank 0 on ")
    assert problem[at:] in flat(section("Receipts"))


def test_the_excuse_is_what_is_printed(excused: Made) -> None:
    (told,) = (s for s in verdict(excused.result).notes if "exceeded the tolerance" in s)
    start, _, end = re.sub(r"\d+ places?", "13 places", told).partition("; the greatest: ")
    assert f"{start}; the greatest: weights of 0.bias at the end, difference" in flat(TEXT)
    assert re.fullmatch(r"[a-z_0-9. ]+ at .+, difference \S+, control \S+\.", end)


def test_statuses_are_all_there_are() -> None:
    text = section("Status")
    table = [row[:2] for row in rows(text)[1:]]
    assert {name for name, _ in table} == {"reference", *STATES}
    running = "A record says `running` while its run goes on"  # which no comparison shows
    statuses = {s for _, s in table} | ({"`running`"} if running in flat(text) else set())
    assert statuses == {f"`{s}`" for s in typing.get_args(records.Status)}


def test_evidence_and_refusals_are_in_the_code(wrong: Made) -> None:
    text = section("Receipts")
    known = {s for code in SOURCES for s in strings(code)}
    refusals = [row[0].strip("`") for row in rows(text.split("it says | look at")[1])]
    assert len(refusals) == 5
    assert not [words for words in refusals if not any(words in s for s in known)]
    keys = {row[0]: spans(row[1]) for row in rows(text.split("After")[0])[1:]}
    assert not {key for found in keys.values() for key in found} - known - {"local_sgd"}
    runs = wrong.result.strategies
    for name, found in (("ddp", keys["`ddp`"]), ("local_sgd", ["replicas", "merges", "drift"])):
        receipt = runs[name].receipt
        assert receipt and {*found, "precision"} <= receipt.evidence.keys()


def test_quantities_are_all_that_can_differ() -> None:
    found = set(STEP_QUANTITIES)
    for node in ast.walk(PARITY):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Found":
            quantity = " ".join(strings(node.args[1]))
            found.add(quantity + " of NAME" * quantity.endswith(("weights", "metric")))
    table = rows(section("Parity").split("The tolerances")[0])[1:]
    assert {q for row in table for q in spans(row[0])} == found - {""}


def test_tolerances_are_the_codes() -> None:
    head, *table = rows(
        section("Parity").split("`hybrid/comparison/tolerances.py`:")[1].split("###")[0]
    )
    for name, *cells in table:
        precision, _, hook = name.replace(" `comm_hook` ", "").partition(",")
        *sizes, steps = cells
        stated = dict(zip(head[1:6], map(float, sizes), strict=True))
        assert stated == tolerance(precision, hook or "none"), name
        assert steps == f"{EXACT_STEPS[precision]} steps"
    named = {name for name, *_ in table}
    hooks = {f"fp32, `comm_hook` {hook}" for hook in HOOK_TOLERANCES}
    assert named == {*TOLERANCES, *hooks}


def test_other_constants_are_the_codes() -> None:
    assert SAME_START == 1e-9 and "may differ by 1e-9" in TEXT
    assert SHARE_OF_NOISE == 0.25 and "at least a quarter as much" in flat(TEXT)
    assert CONTROL_MICRO_BATCHES == (1, 3, 7, 2, 5, 11)
    assert "in 1, 3 and 7 micro-batches (or 2, 5 and 11," in flat(TEXT)
    assert f"over {UNLIKE_STEPS} times the median. The first {WARMUP_STEPS} st" in flat(TEXT)
    assert tuple(spans(section("The precision ledger"))[: len(KINDS)]) == KINDS


def test_keys_exist(wrong: Made, excused: Made) -> None:
    results = [records.to_dict(m.result) for m in (wrong, excused)]
    named, parent = 0, ""
    for cell, _ in rows(section("Exact values"))[1:]:
        for span in spans(cell):
            path = f"{parent}{span}" if span.startswith(".") else span
            parent = path.rpartition(".")[0]
            named += 1
            assert any(find(result, path.split(".")) for result in results), path
    assert named > 40
    assert "2d" not in results[0]["parity"] and results[0]["strategies"]["2d"]["reason"]
    failed = results[0]["parity"]["fsdp"]
    assert (failed["ok"], failed["first_difference"]) == (False, None)


def test_snippet_runs(wrong: Made, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    monkeypatch.chdir(wrong.out.parent.parent)
    exec(snippet, {})
    lines = capsys.readouterr().out.splitlines()
    starts = ["single ok True None", "ddp ok False {'step': 0", "local_sgd ok True None"]
    starts += ["fsdp failed False rank 0 on", "2d not_possible None 2 stages"]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def test_commands_are_the_command_lines(wrong: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(wrong.out.parent.parent)
    group: Any = get_command(app)
    (fenced,) = re.findall(r"```bash\n\s*(hybrid .*)\n", TEXT)
    _, command, *arguments = shlex.split(fenced)
    given = group.commands[command].make_context(command, arguments).params
    assert load_job(given["job"], []).train.steps == 30  # the job as it ran
    text = " ".join(spans(TEXT))
    named = {*re.findall(r"\bhybrid ([a-z]+)(?! JOB\w)\b", text)}
    assert named == {"compare", "doctor"} <= group.commands.keys()
    options = {o for p in group.commands["compare"].params for o in p.opts}
    used = set(re.findall(r"(?<![\w-])--[a-z-]+", text))
    words = {"--out", "--json", "--set", "--nproc", "--reference", "--strict-reference", "--resume"}
    words.add("--strategies")
    assert words == used <= options
    overrides = re.findall(r"--set ([\w.]+=\w+)", text)
    assert len(overrides) == 3 and load_job(JOBS / "mlp.toml", overrides)


def test_files_exist(wrong: Made, excused: Made) -> None:
    named = re.findall(r"`((?:launch|hybrid|tests|benchmarks)/[\w./-]+)`", TEXT)
    assert len(named) > 3 and not [path for path in named if not (ROOT / path).exists()]
    for file in ("report.html", "compare.md", "compare.json"):
        assert f"`{file}`" in TEXT and (wrong.out / file).exists()
    for file in ("job.json", "record.json", "steps.jsonl", "checkpoints/final/"):
        assert f"`{file}`" in TEXT and (wrong.out / "ddp" / file).exists()
    assert "`OUT/single_cut_1`" in TEXT and (excused.out / "single_cut_1").is_dir()
    assert "`local_sgd_emulation`" in TEXT and (wrong.out / "local_sgd_emulation").is_dir()


def test_exit_statuses(wrong: Made, excused: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(result: Comparison | None, *more: str) -> int:
        monkeypatch.setattr(session, "compare", lambda *_, **__: result)
        return CliRunner().invoke(app, ["compare", str(JOBS / "mlp.toml"), *more]).exit_code

    assert (status(excused.result), status(wrong.result)) == (0, 1)
    for error, code in ((hybrid.JobError("x"), 2), (ModuleNotFoundError("x", name="plotly"), 3)):
        assert (first_line(error), exit_status(error)) == ("x", code)
    words = ("0 where all that was possible", "1 where a run failed", "2 where the job", "3 where")
    assert all(w in flat(section("In CI")) for w in words)
