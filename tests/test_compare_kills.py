"""What the campaign of killed comparisons (benchmarks/compare_kills.py) looks for, it finds."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import kill_traces
from benchmarks.compare_kills import prepare, run_case, stands
from benchmarks.kill_traces import half_files, left_in, owners, processes_of, read_result
from hybrid import report
from hybrid.checkpoint.tensors import parts_of
from hybrid.checkpoint.weights import save_weights
from hybrid.job.variants import resolve
from hybrid.launch.failures import RankStatus
from hybrid.launch.placement import Placement
from hybrid.training.folder import begin_run
from tests.conftest import small_job
from tests.test_report import make_comparison


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A comparison with a run, all of it whole."""
    run = tmp_path / "run" / "ddp"
    begin_run(run, small_job(), resolve(small_job(), "ddp"))
    (run / "steps.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    save_weights(parts_of({"a": torch.ones(3)}), run / "checkpoints" / "final", {"step": 1})
    RankStatus(small_job(), Placement(), run / "logs").close()
    report.write(make_comparison("ddp"), tmp_path / "run")
    assert half_files(tmp_path / "run") == []
    return tmp_path / "run"


def cut(path: Path) -> None:
    """Takes the last bytes of a file away."""
    path.write_bytes(path.read_bytes()[:-3])


HALF: dict[str, Callable[[Path], None]] = {
    "compare.json": cut,
    "compare.md": cut,
    "report.html": lambda path: path.write_text("<html><p>half of"),
    "ddp/record.json": cut,
    "ddp/job.json": lambda path: path.write_text(""),
    "ddp/steps.jsonl": cut,
    "ddp/checkpoints/final/model.safetensors": cut,
    "ddp/checkpoints/final/.tmpQx81": Path.touch,  # the safetensors library's own
}


@pytest.mark.parametrize("name", HALF)
def test_half_a_file_is_found(name: str, out: Path) -> None:
    HALF[name](out / name)
    (found,) = half_files(out)
    where = name.replace("model.safetensors", "checkpoint.json")
    assert found.startswith(f"{where}: "), found


def test_a_lost_comparison_is_found(out: Path) -> None:
    old = read_result(out)
    assert old["runs"] == ["ddp", "single"] and stands(out, old) == []
    kept = out / "previous"
    kept.mkdir()
    for name in ("compare.json", "ddp"):
        shutil.move(out / name, kept / name)
    lost = "the comparison before is gone, or is not said to be old"
    assert stands(out, old) == [lost]
    (kept / "moved.json").write_text("{}")
    assert stands(out, old) == ["the run single of the comparison before is gone"]
    (kept / "single").mkdir()
    assert stands(out, old) == []


def test_what_still_runs_and_what_is_left_is_found(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill_traces, "ENDING_S", 0.2)
    words = [sys.executable, "-c", "import time; time.sleep(60)", "--out", str(out / "ddp")]
    with subprocess.Popen([*words, "--parent", "1"], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 10
        while not list(processes_of(out)) and time.monotonic() < deadline:
            time.sleep(0.01)
        (found,) = left_in(out)
        assert "--parent" in found and list(processes_of(out, rank=0)) == []
        process.kill()
    assert left_in(out) == []
    temporary = out.parent / "tmp"
    for name in ("torchinductor_root", "pymp-x", ".hidden"):
        (temporary / name).mkdir(parents=True)
    assert owners(temporary) == [".hidden", "pymp-x"]


@pytest.mark.campaign
def test_a_case_goes_well(tmp_path: Path) -> None:
    row = run_case(3, 0, tmp_path, prepare(tmp_path))
    assert row["problems"] == []
