"""What saving, loading and verifying a checkpoint takes, beside `dd` in the same run.

    python -m benchmarks.checkpoint_speed --out out/checkpoint_speed [--strategies a,b] [--rounds N]

Run from the top folder, on an idle machine. A perceptron of 100 million parameters under AdamW, so
1.2 GB of state. Each round trains a few steps that save, then resumes, and writes as many bytes by
`dd conv=fdatasync` into the same folder, before and after. FOLDER/checkpoint_speed.md has the
table: medians over rounds, with the least and the greatest."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hybrid
from hybrid.checkpoint.folders import list_checkpoints, verify
from hybrid.job.schema import Job
from hybrid.training.check import check_job
from hybrid.training.progress import Watcher
from hybrid.training.run import launch

from .checkpoint_probe import PROBE
from .machine import summarise_machine

RANKS = {"single": 1, "ddp": 2, "fsdp": 2, "zero1": 2, "zero3": 2, "pipeline": 2}
PROGRAM = [sys.executable, "-m", "benchmarks.checkpoint_probe"]
SIZES = [1001, 7301, 7301, 5001, 1001, 101]  # of the layers; 102 million parameters
MIB = 2**20


def job(asynchronous: bool) -> Job:
    """Return a job that saves after each fourth step of eight."""
    return hybrid.load_job(
        {
            "model": {"name": "mlp", "options": {"sizes": SIZES}},
            "data": {
                "name": "random",
                "options": {"samples": 12, "features": SIZES[0], "classes": SIZES[-1]},
            },
            "optimizer": {"name": "adamw", "lr": 1e-4},
            "train": {"global_batch": 4, "steps": 8},
            "checkpoint": {"every": 4, "keep": 2, "async": asynchronous},
        }
    )


def dd(folder: Path, size: int) -> float:
    """Write so many bytes by dd and flush them; return bytes a second."""
    path = folder / "dd"
    begun = time.monotonic()
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={MIB}", f"count={size // MIB}"]
    subprocess.run([*command, "conv=fdatasync"], check=True, stderr=subprocess.DEVNULL)
    rate = size // MIB * MIB / (time.monotonic() - begun)
    path.unlink()
    return rate


def measure(strategy: str, out: Path) -> dict[str, Any]:
    """Make one round of one strategy: synchronous saves, asynchronous ones, a load, dd."""
    found: dict[str, Any] = {}
    for asynchronous in (False, True):
        folder = out / f"{strategy}{'_async' if asynchronous else ''}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.environ[PROBE] = str(folder / "probe")
        checked = check_job(job(asynchronous)).job
        launch(checked, strategy, RANKS[strategy], folder, Watcher(), program=PROGRAM)
        lines = read(folder, "save")
        key = "async" if asynchronous else "save"
        # Later asynchronous saves wait for the disk, which takes longer than two steps here.
        found[f"{key}_s"] = stall(folder) if asynchronous else statistics.median(slowest(lines))
        found[f"{key}_extra"] = max(line["extra_bytes"] for rank in lines for line in rank)
        if asynchronous:
            continue
        newest = list_checkpoints(folder / "checkpoints")[-1]
        found["bytes"] = sum(path.stat().st_size for path in newest.iterdir())
        found["dd"] = [dd(folder, found["bytes"])]
        begun = time.process_time()
        assert not verify(newest)[1]
        found["verified"] = found["bytes"] / (time.process_time() - begun)
        launch(
            checked, strategy, RANKS[strategy], folder, Watcher(), program=PROGRAM, resume=newest
        )
        lines = read(folder, "load")
        found["load_s"] = max(slowest(lines))
        found["load_extra"] = max(line["extra_bytes"] for rank in lines for line in rank)
        found["dd"].append(dd(folder, found["bytes"]))
    return found


def read(folder: Path, *what: str) -> list[list[dict[str, Any]]]:
    """Return what each rank noted of its saves, loads or waits."""
    files = sorted(folder.glob("probe.*"))
    lines = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    return [[line for line in rank if line["what"] in what] for rank in lines]


def stall(folder: Path) -> float:
    """Return for how long the first save stopped the slowest rank: in the call, and in the wait for
    its copy before the next optimizer step."""
    found = []
    for lines in read(folder, "save", "copy"):
        first = [line["what"] for line in lines].index("save")
        rest = [line["seconds"] for line in lines[first + 1 :] if line["what"] == "copy"]
        found.append(lines[first]["seconds"] + (rest[0] if rest else 0.0))
    return max(found)


def slowest(lines: Sequence[Sequence[dict[str, Any]]]) -> list[float]:
    """Return the seconds of each save or load, on its slowest rank."""
    return [max(line["seconds"] for line in each) for each in zip(*lines, strict=True)]


def row(strategy: str, rounds: Sequence[dict[str, Any]]) -> str:
    """Return a line of the table."""
    size = rounds[0]["bytes"]
    rates = [size / one["save_s"] / statistics.mean(one["dd"]) for one in rounds]
    stalls = [one["async_s"] / one["save_s"] for one in rounds]
    cells = [
        f"`{strategy}` x {RANKS[strategy]}",
        f"{size / 1e9:.2f} GB",
        spread([one["save_s"] for one in rounds], "{:.2f} s"),
        spread(rates, "{:.2f}"),
        spread([one["save_extra"] / MIB for one in rounds], "{:.0f} MiB"),
        spread([one["load_s"] for one in rounds], "{:.2f} s"),
        spread([one["load_extra"] / MIB for one in rounds], "{:.0f} MiB"),
        spread([one["verified"] / 1e9 for one in rounds], "{:.2f} GB/s"),
        spread(stalls, "{:.3f}"),
    ]
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], form: str) -> str:
    """Format a median with the least and the greatest."""
    middle = form.format(statistics.median(values))
    return f"{middle} [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else middle


HEAD = """# What a checkpoint costs

`{command}`: {machine}.

Memory is what a rank held above its shard. `async / save` is how long the first asynchronous save
stops the training, beside a synchronous one. `dd conv=fdatasync` wrote as many bytes in the same
run.

| strategy | state | a save | of dd's | memory | a load | memory | verified | async / save |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategies", default=",".join(RANKS))
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(asked.rounds):
        for strategy in asked.strategies.split(","):
            found.setdefault(strategy, []).append(measure(strategy, asked.out))
            print(f"round {number + 1}: {strategy}: {found[strategy][-1]}", flush=True)
    command = f"python -m benchmarks.checkpoint_speed --strategies {asked.strategies}"
    text = HEAD.format(command=f"{command} --rounds {asked.rounds}", machine=summarise_machine())
    text += "".join(row(name, rounds) + "\n" for name, rounds in found.items())
    (asked.out / "checkpoint_speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
