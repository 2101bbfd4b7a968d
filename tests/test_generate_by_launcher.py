"""`hybrid generate` writes text from a run that any launcher started."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from hybrid import records
from hybrid.job.file import to_dict
from hybrid.training.generate import generate
from tests.conftest import ROOT, hybrid_command, small_job
from tests.pages import environment
from tests.texts import many

GPT = {"num_layers": 5, "width": 24, "num_heads": 3, "context": 16}
SCRIPTS = {
    "own": "",
    "torchrun": "launch/shell/torchrun.sh",
    "accelerate": "launch/shell/accelerate.sh",
    "deepspeed": "launch/shell/deepspeed.sh",
    "mpirun.openmpi": "launch/mpi/openmpi.sh",
    "mpirun.mpich": "launch/mpi/mpich.sh",
}  # srun's runs are those of tests/test_slurm.py


@pytest.mark.slow
@pytest.mark.parametrize("launcher", SCRIPTS)
def test_text_is_written_from_a_run_of(launcher: str, tmp_path: Path) -> None:
    if launcher.startswith("mpirun") and not shutil.which(launcher):
        pytest.skip(f"not installed: {launcher}")
    options = {"path": many(tmp_path / "texts"), "context": 16, "cache": str(tmp_path / "cache")}
    job = small_job(
        model={"name": "gpt", "options": GPT},
        data={"name": "text", "options": options},
        train={"global_batch": 5, "steps": 2},
    )
    file, out = tmp_path / "asked.json", tmp_path / "run"
    records.write(to_dict(job), file)
    if launcher == "own":
        train = ["train", str(file), "--strategy", "ddp", "--nproc", "2", "--out", str(out)]
        assert hybrid_command(*train).returncode == 0
    else:
        asked = {"JOB": str(file), "STRATEGY": "ddp", "NPROC": "2", "OUT": str(out)}
        done = subprocess.run(
            ["bash", str(ROOT / SCRIPTS[launcher])],
            env=environment(tmp_path) | asked | {"MPIRUN": launcher},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "record.json").read_text())["world_size"] == 2
    assert generate(out, "al", num_tokens=5).startswith("al")
    if launcher == "own":
        wrote = hybrid_command("generate", str(out), "--prompt", "al", "--tokens", "5", "--json")
        assert wrote.returncode == 0, wrote.stderr
        assert json.loads(wrote.stdout)["text"].startswith("al")
