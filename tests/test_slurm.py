"""Under a real SLURM: every batch script runs; jobs that are requeued or cancelled, and one that
loses a rank, end as launch/slurm.md says."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hybrid import records
from tests import slurm_cluster
from tests.conftest import hybrid_command
from tests.pages import blocks, environment, record_of
from tests.test_failures import ranks_of, wait_for_steps

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=str(slurm_cluster.missing())),
]
COMMANDS = [c for block in blocks() if block.how == "in SLURM" for c in block.commands]
LONG = "--set train.epochs=100000"


class Slurm(NamedTuple):
    """A running SLURM, and the folder that commands are typed in."""

    environ: dict[str, str]
    folder: Path

    def run(self, command: str) -> str:
        """What a command of SLURM's prints."""
        words = ["bash", "-c", command]
        return subprocess.run(
            words, cwd=self.folder, env=self.environ, check=True, capture_output=True, text=True
        ).stdout

    def submit(self, command: str) -> str:
        """The number of a new job."""
        return self.run(command.replace("sbatch", "sbatch --parsable", 1)).strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job."""
        words = self.run(f"scontrol --oneliner show job {number}").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, state: str, seconds: float = 90) -> dict[str, str]:
        """The job, when it is in that state."""
        wait_for(lambda: self.job(number)["JobState"] == state, seconds, lambda: self.log(number))
        return self.job(number)

    def log(self, number: str) -> str:
        """What the job printed."""
        file = self.folder / f"slurm-{number}.log"
        return file.read_text() if file.exists() else ""


def wait_for(condition: Callable[[], bool], seconds: float, said: Callable[[], object]) -> None:
    """AssertionError with what was `said` where it does not come to be."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One for all tests here."""
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environ:
        yield environ


@pytest.fixture
def slurm(cluster: dict[str, str], tmp_path: Path) -> Slurm:
    """Its nodes have no names that resolve, so that scripts are told where the first one is."""
    ours = environment(tmp_path, MASTER_ADDR="127.0.0.1", SLURM_CONF=cluster["SLURM_CONF"])
    return Slurm(ours, tmp_path)


def started(slurm: Slurm) -> tuple[str, Path]:
    """A long job that has begun to train: its number and folder."""
    out = slurm.folder / "out" / "long"
    number = slurm.submit(f"OUT={out} sbatch launch/slurm/srun.sbatch {LONG}")
    wait_for((out / "steps.jsonl").exists, 60, lambda: slurm.log(number))
    wait_for_steps(out, 2)
    assert len(ranks_of(out)) > 2, "srun, and a rank on each node"
    return number, out


def assert_gone(out: Path) -> None:
    """No process of the run is left, a moment after."""
    wait_for(lambda: not ranks_of(out), slurm_cluster.KILL_WAIT_S, lambda: ranks_of(out))


@pytest.mark.parametrize("command", COMMANDS)
def test_batch_script_runs(command: str, slurm: Slurm) -> None:
    number = slurm.submit(command)
    job = slurm.wait(number, "COMPLETED")
    assert job["ExitCode"] == "0:0"
    assert job["NumNodes"] == ("1" if "--nodes 1" in command else "2")
    record = record_of(slurm.folder)
    assert (record["status"], record["world_size"]) == ("ok", 2)
    assert f"{record['strategy']}: {len(record['steps'])} steps, loss" in slurm.log(number)


def test_text_is_written_from_a_run_of_srun(slurm: Slurm) -> None:
    small = "model.options.num_layers=1 data.options.max_bytes=20000 train.steps=1"
    settings = " ".join(f"--set {setting}" for setting in small.split())
    asked = "JOB=launch/jobs/gpt_demo.toml OUT=out/text"
    number = slurm.submit(f"{asked} sbatch launch/slurm/srun.sbatch {settings}")
    slurm.wait(number, "COMPLETED")
    wrote = hybrid_command("generate", str(slurm.folder / "out" / "text"), "--tokens", "3")
    assert wrote.returncode == 0, wrote.stderr


def test_a_cancelled_job_ends_at_once(slurm: Slurm) -> None:
    number, out = started(slurm)
    slurm.run(f"scancel {number}")
    slurm.wait(number, "CANCELLED", slurm_cluster.KILL_WAIT_S + 5)
    assert_gone(out)
    left = records.read(records.Record, out / "record.json")
    assert left.status == "running" or (left.status, left.reason) == ("failed", "interrupted")


def test_a_requeued_job_starts_again(slurm: Slurm) -> None:
    number, out = started(slurm)
    slurm.run(f"scontrol requeue {number}")
    slurm.wait(number, "PENDING", slurm_cluster.KILL_WAIT_S + 5)
    assert_gone(out)
    (out / "steps.jsonl").unlink()
    slurm.run(f"scontrol update JobId={number} StartTime=now")
    job = slurm.wait(number, "RUNNING")
    wait_for_steps(out, 2)
    assert job["Restarts"] == "1"
    assert (out / "steps.jsonl").read_text().startswith('{"step": 0')
    slurm.run(f"scancel {number}")
    assert_gone(out)


def test_a_rank_that_is_killed_ends_one_that_cannot_notice(slurm: Slurm) -> None:
    number, out = started(slurm)
    ranks = {rank: pid for pid in pids_of(out) for rank in (0, 1) if is_rank(pid, rank)}
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGKILL)
    slurm.wait(number, "FAILED", slurm_cluster.KILL_WAIT_S + 15)
    assert_gone(out)


def pids_of(out: Path) -> list[int]:
    """Python processes of a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(out).encode() in words and b"python" in words[0]:
                found.append(int(entry.name))
    return found


def is_rank(pid: int, rank: int) -> bool:
    """Whether SLURM started a process as that one."""
    return f"SLURM_PROCID={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
