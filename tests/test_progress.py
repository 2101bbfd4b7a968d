"""What is shown of runs as they go: figures off a growing `steps.jsonl`, cheaply, in 80 columns."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hybrid.records import EvalResult, Memory, Record, StepRecord, Throughput
from hybrid.report.formats import format_count, format_time
from hybrid.training import progress
from hybrid.training.progress import NUMBERS, Progress, table, time

GIB = 2**30


def step(number: int, **changes: Any) -> dict[str, Any]:
    """One line of steps.jsonl: 8 samples of 64 tokens in half a second."""
    line: dict[str, Any] = {
        "step": number,
        "loss": 3.5 - number / 10,
        "grad_norm": 1.25,
        "lr": 3e-4,
    }
    line |= {"samples": 8, "sample_digest": "0" * 16, "targets": 512, "seconds": 0.5}
    return line | {"memory_bytes": 2 * GIB} | changes


def append(out: Path, *lines: dict[str, Any]) -> None:
    with (out / "steps.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the watcher sees, in seconds: it stands still."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def watcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: list[float]) -> Progress:
    """A watcher outside a terminal, always due, of a run of ten steps that has said it starts."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    made = Progress()
    made.started("fsdp", 10, tmp_path)
    made.poll()
    return made


def shown(watcher: Progress, capsys: pytest.CaptureFixture[str]) -> str:
    """What one poll prints."""
    capsys.readouterr()
    watcher.poll()
    return capsys.readouterr().err


def test_a_line_has_every_figure(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path, step(0), step(1))
    assert shown(watcher, capsys) == (
        "fsdp: step 2/10, loss 3.4000, lr 3.0e-04, grad norm 1.25, 1.02k tok/s, 500 ms/step, "
        "2.00 GiB, ETA 4.0s\n"
    )


def test_one_target_a_sample_is_counted_in_samples(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path, step(0, targets=8))
    assert ", 16.0 samples/s, " in shown(watcher, capsys)


def test_keys_that_an_old_file_lacks_are_left_out(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = step(0)
    for key in ("targets", "seconds", "memory_bytes"):
        del old[key]
    append(tmp_path, old)
    assert shown(watcher, capsys) == "fsdp: step 1/10, loss 3.5000, lr 3.0e-04, grad norm 1.25\n"
    append(tmp_path, step(1, memory_bytes=None))
    assert "1.02k tok/s, 500 ms/step, ETA 4.0s" in shown(watcher, capsys)


def test_a_skipped_step_is_called_so(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    append(tmp_path, step(0, grad_norm=None, skipped=True, loss_scale=1024.0))
    assert "grad norm skipped, " in shown(watcher, capsys)
    append(tmp_path, step(1, skipped=False, loss_scale=512.0))
    assert "grad norm 1.25, " in shown(watcher, capsys)


def test_pace_and_time_left_are_medians_of_recent_steps(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher.total = 100
    slow = [step(i, seconds=60.0) for i in range(40)]
    append(tmp_path, *slow, *[step(40 + i) for i in range(19)], step(59, seconds=9.0))
    line = shown(watcher, capsys)
    assert "1.02k tok/s, 500 ms/step" in line and "ETA 20s" in line


def test_time_left_shrinks_while_a_step_lasts(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    append(tmp_path, step(0, seconds=30.0))
    assert "ETA 4m30s" in shown(watcher, capsys)
    clock[0] += 20
    assert "ETA 4m10s" in shown(watcher, capsys)
    clock[0] += 1000
    assert "ETA 0.0s" in shown(watcher, capsys)
    append(tmp_path, *[step(i) for i in range(1, 10)])
    assert shown(watcher, capsys).endswith(", ending\n")


def test_a_half_written_line_is_read_when_it_is_whole(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(step(0)) + "\n" + json.dumps(step(1)) + "\n"
    file = tmp_path / "steps.jsonl"
    for cut, said in ((10, ""), (len(text) - 5, "step 1/10"), (len(text), "step 2/10")):
        file.write_text(text[:cut])
        line = shown(watcher, capsys)
        assert said in line if said else not line


def test_each_byte_is_read_once(
    watcher: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    read = Path.open

    def count(path: Path, *arguments: Any, **named: Any) -> Any:
        opened.append(watcher.offset)
        return read(path, *arguments, **named)

    append(tmp_path, step(0))
    monkeypatch.setattr(Path, "open", count)
    for _ in range(50):
        watcher.poll()
    assert opened == [0], "nothing was added since"


def test_no_line_within_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    watcher = Progress()
    watcher.started("fsdp", 10, tmp_path)
    append(tmp_path, step(0))
    assert shown(watcher, capsys) == ""
    clock[0] += 10
    assert "step 1/10" in shown(watcher, capsys)
    append(tmp_path, step(1))
    assert shown(watcher, capsys) == ""


def test_in_the_process_that_trains_it_reads_when_it_is_due(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    watcher = Progress(shared=True)
    watcher.started("ddp", 0, tmp_path)
    assert capsys.readouterr().err == ""
    for number, said in ((0, "ddp: starting\n"), (1, "")):
        append(tmp_path, step(number))
        watcher.follow(record().steps[number], 10)
        assert capsys.readouterr().err == said and watcher.offset == 0
    clock[0] += 10
    watcher.follow(record().steps[1], 10)
    assert "ddp: step 2/10, loss" in capsys.readouterr().err


def test_steps_of_an_earlier_run_are_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    append(tmp_path, step(7))
    watcher = Progress()
    watcher.started("fsdp", 10, tmp_path)
    assert shown(watcher, capsys) == "fsdp: starting, 10 steps\n"
    append(tmp_path, step(0))
    watcher.poll()
    watcher.started("zero1", 10, tmp_path)
    said = shown(watcher, capsys)
    assert said == "zero1: starting, 10 steps\n", "nor those of the run before"


def test_a_run_that_is_refused_leaves_no_line_beside_that_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    watcher = Progress()
    watcher.started("fsdp", 10, tmp_path)
    watcher.poll()
    watcher.refused("fsdp")
    clock[0] += 100
    assert shown(watcher, capsys) == "" and not watcher.rows
    watcher.started("ddp", 10, tmp_path)
    watcher.finished("ddp", Record("ddp", "failed", "it broke"))
    assert capsys.readouterr().err == "ddp: starting, 10 steps\nddp: failed: it broke\n"


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "steps": [StepRecord(i, 3.5 - i / 10, 1.25, 3e-4, 8, "0" * 16) for i in range(10)],
        "throughput": Throughput(16.0, 0.5, 0.5, 8, tokens_per_s=1024.0),
        "memory": Memory([GIB, 3 * GIB], "counted"),
        "eval": EvalResult(2.25, 40),
    }
    return Record("fsdp", "ok", **fields | changes)


def test_the_end_shows_the_whole_run(
    watcher: Progress, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    clock[0] += 75
    capsys.readouterr()
    watcher.finished("fsdp", record())
    assert capsys.readouterr().err == (
        "fsdp: done, step 10/10, loss 2.6000, lr 3.0e-04, grad norm 1.25, 1.02k tok/s, "
        "500 ms/step, 3.00 GiB, in 1m15s, eval loss 2.2500\n"
    )
    for pace in (Throughput(16.0, 0.5, 0.5, 8), Throughput(16.0, 0.5, 0.5, 8, tokens_per_s=16.0)):
        watcher.finished("fsdp", record(throughput=pace))
        assert ", 16.0 samples/s, " in capsys.readouterr().err
    watcher.finished("fsdp", record(throughput=None, memory=None, eval=None))
    assert "grad norm 1.25, in 1m15s\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "said"), [("failed", "failed"), ("not_possible", "not possible")]
)
def test_a_run_that_did_not_end_well_says_why(
    watcher: Progress, capsys: pytest.CaptureFixture[str], status: Any, said: str
) -> None:
    watcher.finished("zero3", Record("zero3", status, "no fp16 units"))
    assert f"zero3: {said}: no fp16 units\n" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_shows_everything(
    watcher: Progress, tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    watcher.total = 12_000
    append(tmp_path, step(11_000, loss=10.8273, grad_norm=1234.5, memory_bytes=1.25 * GIB))
    watcher.poll()
    watcher.finished("single", record())
    watcher.finished("zero3", Record("zero3", "failed", "no [fp16] units " + "x" * width))
    console = Console(file=io.StringIO(), width=width)
    console.print(table(watcher.rows, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(len(line) for line in text.splitlines()) <= width
    head, first, second, reason, *_ = text.splitlines()
    assert head.split() == ["run", *NUMBERS[:4], "tok/s", *NUMBERS[5:]]
    figures = "fsdp 11001/12000 10.8273 3.0e-04 1,234 1.02k 500 1.25 GiB 8m20s"
    assert first.split() == figures.split()
    assert second.split()[:3] == ["single", "10/10", "2.6000"]
    assert reason.startswith("zero3: failed: no [fp16] units")


def test_units_of_count_and_time() -> None:
    counts = [0.5, 16, 950, 999.6, 1000, 41234, 999_600, 1.3e6, 2e9]
    assert [format_count(c) for c in counts] == (
        ["0.500", "16.0", "950", "1.00k", "1.00k", "41.2k", "1.00M", "1.30M", "2.00G"]
    )
    times = [0.04, 9.94, 9.96, 59.4, 59.6, 185, 3599.6, 3840, 86399.7, 183600]
    assert [format_time(t) for t in times] == (
        ["0.0s", "9.9s", "10s", "59s", "1m00s", "3m05s", "1h00m", "1h04m", "1d00h", "2d03h"]
    )


def test_watching_costs_no_torch() -> None:
    code = "import sys, hybrid.training.progress as p; p.Progress(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
