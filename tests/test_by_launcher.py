"""`--launcher`: each run of a comparison as the processes of another launcher; four ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid.job.errors import JobError, Stopped
from hybrid.launch.by_launcher import (
    Launcher,
    LauncherFailed,
    choose_launcher,
    pack_job,
    require_launched,
    run_by_launcher,
    unpack_job,
)
from hybrid.launch.placement import Placement
from hybrid.training.run import run_job
from tests.conftest import hybrid_command, small_job

SRUN = f"{sys.executable} -m tests.stand_in_srun -n {{nproc}}"
GUILTY = random.randrange(4)
# A launcher that does not work: what its ranks leave, and how it ends.
LEFT = {"time": 1.0, "host": "h7", "details": "", "cause": None}


def failing_model() -> Any:
    """A model function that raises on the rank that was drawn, in the fork of the stand-in."""
    import torch

    from hybrid.models.losses import cross_entropy

    if os.environ.get("SLURM_PROCID") == os.environ["HYBRID_TEST_GUILTY"]:
        raise OSError("the model's file is gone")
    return [torch.nn.Linear(32, 10)], cross_entropy


def fake(folder: Path, script: str) -> Launcher:
    """A launcher that runs a shell script and starts nothing; $LOGS is where ranks' files go."""
    file = folder / "fake"
    file.write_text(f"#!/bin/sh\nLOGS={folder}/logs\n{script}\n")
    file.chmod(0o755)
    found = choose_launcher(f"{file} {{nproc}}", "compare")
    assert found is not None
    return found


def failure_of(folder: Path, script: str, nproc: int = 4) -> LauncherFailed:
    with pytest.raises(LauncherFailed) as failed:
        run_by_launcher(fake(folder, script), nproc, ["train"], folder, lambda: None)
    return failed.value


def leave(rank: int, **values: Any) -> str:
    return f"cat > $LOGS/rank{rank}.error.json <<'END'\n{json.dumps(LEFT | values)}\nEND"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("srun -n 4", "has no {nproc}"),
        ("", "has no {nproc}"),
        ("{nproc}", "has no {nproc}"),
        ("sh 'x {nproc}", "No closing quotation"),
        ("no_such_launcher -n {nproc}", "there is no command 'no_such_launcher' here"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused(template: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as refused:
        hybrid.compare(small_job(), ["ddp"], nproc=4, out=tmp_path / "out", launcher=template)
    assert words in str(refused.value) and "valid: such as" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_no_shell_reads_the_command_and_python_starts_once() -> None:
    tail = ["-m", "hybrid", "train"]
    words = Launcher("srun -n {nproc} --comment '$(id) x{nproc}'").command(4, ["train"])
    assert words == ["srun", "-n", "4", "--comment", "$(id) x4", sys.executable, *tail]
    for start in ("torchrun --nproc-per-node {nproc}", "accelerate launch --num_processes {nproc}"):
        assert Launcher(start).command(4, ["train"])[-4:] == ["4", *tail]
    assert Launcher("deepspeed --num_gpus {nproc}").command(4, ["train"])[3] == "--module"
    words = Launcher("torchrun --nproc-per-node {nproc} --no-python").command(4, ["train"])
    assert words[-4:] == [sys.executable, *tail]


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_ranks_of_a_launcher_compare_nothing(
    local_rank: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key, value in {"RANK": local_rank, "WORLD_SIZE": "4", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(key, value)
    done = hybrid_command("compare", "launch/jobs/linear.toml", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    line = "hybrid: compare: this is rank 0 of 4 that torchrun started; valid: in one process"
    assert done.stderr.startswith(line if local_rank == "0" else "")
    assert done.stderr.count("\n") == (1 if local_rank == "0" else 0)  # one line for a host


def test_a_process_must_be_one_of_those_that_were_asked_for() -> None:
    require_launched(Placement(3, 4, 3, "srun"), 4)
    require_launched(Placement(), 1)
    with pytest.raises(JobError, match="does not tell its 4 processes their ranks"):
        require_launched(Placement(), 4)
    with pytest.raises(JobError, match="it started 3 processes, and this run has 4"):
        require_launched(Placement(0, 3, 0, "srun"), 4)
    assert unpack_job(pack_job({"model": {"name": "ä"}}, 4)) == ({"model": {"name": "ä"}}, 4)
    with pytest.raises(JobError, match="holds no job"):
        unpack_job("x")


def test_the_first_cause_is_the_ranks_own(tmp_path: Path) -> None:
    lost = "RuntimeError: Connection closed by peer"
    script = [leave(0, message=lost, kind="error"), leave(2, message="OSError: gone", kind="error")]
    failed = failure_of(tmp_path, "\n".join([*script, "exit 137"]))
    assert str(failed) == "rank 2 on h7: OSError: gone"


def test_else_it_is_what_the_launcher_says(tmp_path: Path) -> None:
    failed = failure_of(tmp_path, "echo srun: error: no such partition >&2; exit 1")
    assert "fake: exited with 1: srun: error: no such partition (log: " in str(failed)
    assert failure_of(tmp_path, "kill -9 $$").failure.message.startswith("was ended by SIGKILL")
    broken = fake(tmp_path, "")
    (tmp_path / "fake").write_text("#!/no/such/interpreter\n")
    with pytest.raises(LauncherFailed, match="fake: cannot be started: No such file"):
        run_by_launcher(broken, 4, ["train"], tmp_path, lambda: None)
    refused = failure_of(tmp_path, "echo hybrid: train.steps = 0: valid: 1 or more; exit 2")
    assert (refused.failure.kind, refused.failure.message[:15]) == ("job", "train.steps = 0")


@pytest.mark.parametrize("saved", [True, False])
def test_a_signal_goes_on_to_the_launcher_as_sigterm(saved: bool, tmp_path: Path) -> None:
    kept = leave(1, message="stopped by SIGTERM after step 3, which is saved", kind="stopped")
    script = f"trap 'touch $LOGS/told; {'exit 1' if not saved else 'END=1'}' TERM\nEND=\n"
    script += f"while [ -z $END ]; do sleep 0.05; done\n{kept}\nexit 1"
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    with pytest.raises(Stopped) as stopped:
        rest = 4, ["train"], tmp_path, lambda: None
        run_by_launcher(fake(tmp_path, script), *rest, stops=True)
    assert (tmp_path / "logs" / "told").exists()
    how = "after step 3, which is saved" if saved else "before the first step was saved"
    assert how in str(stopped.value) and stopped.value.number == signal.SIGUSR1


def test_a_launcher_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybrid.launch.by_launcher.GRACE_S", 0.3)

    def interrupt() -> None:
        if (tmp_path / "logs" / "pid").exists():
            raise KeyboardInterrupt

    script = "trap '' TERM\necho $$ > $LOGS/pid\nwhile true; do sleep 0.1; done"
    with pytest.raises(KeyboardInterrupt):
        run_by_launcher(fake(tmp_path, script), 4, ["train"], tmp_path, interrupt)
    time.sleep(0.1)
    pid = (tmp_path / "logs" / "pid").read_text().strip()
    assert not pid or not Path(f"/proc/{pid}").exists()


def test_a_run_that_leaves_no_result_has_failed(tmp_path: Path) -> None:
    launcher = fake(tmp_path, "exit 0").template
    with pytest.raises(LauncherFailed, match="fake: ended well, and rank 0 has left no result in"):
        run_job(small_job(), "ddp", tmp_path / "out", nproc=4, launcher=launcher)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["status"] == "failed" and "left no result" in record["reason"]


def test_runs_of_a_comparison_are_processes_of_the_launcher(tmp_path: Path) -> None:
    job = small_job(train__steps=3)
    result = hybrid.compare(job, ["ddp"], nproc=4, out=tmp_path, launcher=SRUN)
    assert result.ok and result.parity["ddp"].state == "equal"
    assert [run.world_size for run in result.strategies.values()] == [1, 4]
    for rank in range(4):
        assert (tmp_path / "ddp" / "logs" / f"rank{rank}.log").exists()
    assert "hybrid: what each rank N prints" in (
        tmp_path / "ddp" / "logs" / "launcher.log"
    ).read_text(errors="replace")


def test_a_rank_that_fails_under_the_launcher_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_tryout: None
) -> None:
    monkeypatch.setenv("HYBRID_TEST_GUILTY", str(GUILTY))
    job = small_job(model={"name": "tests.test_by_launcher:failing_model", "options": {}})
    with pytest.raises(LauncherFailed) as failed:
        run_job(job, "ddp", tmp_path, nproc=4, launcher=SRUN)
    assert f"rank {GUILTY} on " in str(failed.value)
    assert "OSError: the model's file is gone" in str(failed.value)
