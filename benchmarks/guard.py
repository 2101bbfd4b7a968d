"""What `[guard]` costs a step, where no step goes wrong, as a Markdown table.

    python -m benchmarks.guard --out out/guard

Run from the top folder; two minutes on two cores. Runs with and without the section alternate, on
two ranks, and must have equal losses. A small model shows the exchange itself, since its step has
little else to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import hybrid
from benchmarks.machine import summarise_machine
from hybrid.launch.warm import warm_ranks
from hybrid.records import Record
from hybrid.training.progress import Watcher
from hybrid.training.run import launch

STRATEGIES = ("ddp", "fsdp", "zero2", "pipeline")
GPT = {"num_layers": 4, "width": 96, "num_heads": 3, "context": 64, "vocab_size": 101}
WORKLOADS: dict[str, dict[str, Any]] = {
    "mlp of 3,000 parameters": {
        "model": {"name": "mlp", "options": {"sizes": [32, 48, 24, 10]}},
        "data": {"name": "random", "options": {"samples": 400, "features": 32}},
    },
    "gpt of 460,000 parameters": {
        "model": {"name": "gpt", "options": GPT},
        "data": {
            "name": "tests.workloads:sentences",
            "options": {"size": 400, "tokens": 64, "vocab_size": 101},
        },
    },
}
COMMON: dict[str, Any] = {
    "optimizer": {"name": "adamw", "lr": 0.001},
    "train": {"global_batch": 8, "steps": 60, "clip_norm": 1.0},
}


def measure(job: dict[str, Any], strategy: str, out: Path, guarded: bool) -> Record:
    """Train once; the record has the median of the step's times."""
    settings = {"guard": {"non_finite": "skip", "spike_factor": 1e6}} if guarded else {}
    return launch(hybrid.load_job({**job, **COMMON, **settings}), strategy, 2, out, Watcher())


def make_row(title: str, strategy: str, out: Path, rounds: int) -> str:
    """Return a row of the table, of `rounds` pairs of runs."""
    pairs = []
    for _ in range(rounds):
        runs = [measure(WORKLOADS[title], strategy, out, guarded) for guarded in (False, True)]
        losses = [[step.loss for step in run.steps] for run in runs]
        assert losses[0] == losses[1], f"{strategy}: the guard changed a loss"
        pairs.append([run.throughput.step_s_median * 1e3 for run in runs if run.throughput])
    without, more = [pair[0] for pair in pairs], [pair[1] - pair[0] for pair in pairs]
    spread = f"{statistics.median(more):+.2f} [{min(more):+.2f}, {max(more):+.2f}]"
    return f"| {title} | {strategy} | {statistics.median(without):.2f} | {spread} |"


def main() -> None:
    """Measure, and write `guard.md` into --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with warm_ranks():
        rows = [
            make_row(title, strategy, given.out / "run", given.rounds)
            for title in WORKLOADS
            for strategy in STRATEGIES
        ]
    about = (
        f"{given.rounds} pairs of runs of 60 steps on two ranks, with and without `[guard]`; "
        "in each the median step. What the guard adds: the median of the pairs' differences "
        "[least, greatest]. No step is bad; losses are equal to the bit."
    )
    page = ["# What `[guard]` costs a step", "", about, ""]
    page += ["| model | strategy | ms without | ms more |", "|---|---|---:|---:|", *rows, ""]
    load = os.getloadavg()[1]
    page += [
        f"{summarise_machine()}. Load {load:.1f}. `python -m benchmarks.guard --out out/guard`."
    ]
    (given.out / "guard.md").write_text("\n".join(page) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
