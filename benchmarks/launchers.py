"""One job under every launcher: the same losses, as a Markdown table; and how fast a run starts.

    python -m benchmarks.launchers > benchmarks/launchers.md

Run from the top folder; some minutes on two cores. Launchers that are not installed are left out,
and said to be. srun needs a SLURM that runs; tests/slurm_cluster.py starts one on one machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hybrid import records
from hybrid.comparison.parity import relative
from hybrid.records import Record

from .machine import summarise_machine

JOB = "launch/jobs/mlp.toml"
STRATEGIES = ("ddp", "fsdp", "zero2", "pipeline")
PYTHON = [sys.executable, "-m", "hybrid"]
MODULE = ["-m", "hybrid"]
LAUNCHERS = {
    "hybrid": PYTHON,
    "torchrun": ["torchrun", "--nproc-per-node", "2", *MODULE],
    "accelerate": [
        *("accelerate", "launch", "--config_file", "launch/accelerate/{}.yaml"),
        *("--num_processes", "2", *MODULE),
    ],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--module", "hybrid"],
    "mpirun (Open MPI)": ["mpirun.openmpi", "--allow-run-as-root", "-np", "2", *PYTHON],
    "mpirun (MPICH)": ["mpirun.mpich", "-np", "2", *PYTHON],
    "srun": ["srun", "-K1", "-n2", *PYTHON],
}
STARTS = 5
CONFIG = {"pipeline": "ddp"}  # accelerate's name for processes and nothing else


def run(launcher: str, strategy: str, out: Path) -> Record | str:
    """The record of one run, or why there is none."""
    words = [w.format(CONFIG.get(strategy, strategy)) for w in LAUNCHERS[launcher]]
    if not shutil.which(words[0]):
        return "not installed"
    own = ["--nproc", "2"] if launcher == "hybrid" else []
    command = [*words, "train", JOB, "--strategy", strategy, *own, "--out", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        return f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1][:80]}"
    return records.read(Record, out / "record.json")


def largest(record: Record, reference: Record) -> float:
    """Greatest relative difference of a loss at any step."""
    pairs = zip(record.steps, reference.steps, strict=True)
    return max(relative(a.loss, b.loss) for a, b in pairs)


def start_up(folder: Path) -> tuple[list[float], list[str]]:
    """Seconds from the command to the first step of a pipeline on two processes, of several runs,
    and what they compiled."""
    compiled, seconds = folder / "ops", []
    words = ["train", JOB, "--strategy", "pipeline", "--nproc", "2", "--set", "train.epochs=1"]
    for i in range(STARTS):
        out = folder / f"start-{i}"
        began = time.monotonic()
        run = subprocess.Popen(
            [*PYTHON, *words, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TORCH_EXTENSIONS_DIR": str(compiled)},
        )
        steps = out / "steps.jsonl"
        while run.poll() is None and not (steps.exists() and steps.read_text()):
            time.sleep(0.01)
        seconds.append(time.monotonic() - began)
        assert run.wait(timeout=300) == 0
    return sorted(seconds), [path.name for path in compiled.rglob("*")]


def main() -> None:
    """The table, one row a launcher and strategy; then the start."""
    print("# One job under every launcher\n")
    print(
        f"`{JOB}` on two processes of one thread each, gloo. {summarise_machine()}.\n"
        "Command: `python -m benchmarks.launchers`. Differences: the greatest of a loss at any "
        "step, relative to `single`.\n"
    )
    print("| strategy | launcher | steps | difference | last loss | whole command, s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        single = run("hybrid", "single", Path(folder) / "single")
        assert isinstance(single, Record), single
        for strategy in STRATEGIES:
            for launcher in LAUNCHERS:
                began = time.monotonic()
                record = run(launcher, strategy, Path(folder) / f"{strategy}-{launcher}")
                took = time.monotonic() - began
                row = f"{record} | | | "
                if isinstance(record, Record):
                    away, last = largest(record, single), record.steps[-1].loss
                    row = f"{len(record.steps)} | {away:.1e} | {last:.7f} | {took:.1f}"
                print(f"| {strategy} | {launcher} | {row} |", flush=True)
        seconds, compiled = start_up(Path(folder))
    print("\n## From the command to the first step\n")
    print(
        f"`pipeline` on two processes, {STARTS} times: median {seconds[STARTS // 2]:.1f} s, "
        f"{seconds[0]:.1f} to {seconds[-1]:.1f} s. Ops compiled: {', '.join(compiled) or 'none'}."
    )


if __name__ == "__main__":
    main()
