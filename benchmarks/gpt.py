"""The GPT of `launch/jobs/gpt.toml` under every strategy, in three precisions, as pipelines of 2, 3
and 4 stages, and twice with dropout. Prints the tables of `gpt.md`.

    python -m benchmarks.gpt out/gpt > benchmarks/gpt.md

A comparison that lies in the folder already is not run again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import hybrid
from hybrid import records
from hybrid.records import Comparison, Record
from hybrid.strategies.registry import NAMES

from .machine import summarise_machine

JOB = "launch/jobs/gpt.toml"
FLAVOURS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"train.precision": "bf16"},
    "fp16": {"train.precision": "fp16"},
}
DROPOUT = {"model.options.dropout": 0.1, "train.steps": 5}
TWICE = ("ddp", "fsdp", "zero3", "pipeline", "2d")


def compare(folder: Path, changes: dict[str, Any], strategies: list[str], nproc: int) -> Comparison:
    """A comparison, from its file where there is one."""
    file = folder / "compare.json"
    if not file.exists():
        hybrid.compare(hybrid.load_job(JOB, changes), strategies, nproc, folder)
    return records.read(Comparison, file)


def row(name: str, run: Record, found: Comparison) -> str:
    """One strategy of a comparison as a row."""
    layout = ", ".join(f"{axis} {n}" for axis, n in run.layout.items() if n > 1) or "1 process"
    verdict = found.parity.get(name)
    if verdict is None:
        return f"| {name} | | not possible: {run.reason} | | | | | | |"
    state = "reference" if name == found.reference else "equal" if verdict.ok else "NOT EQUAL"
    state += " (excused)" if verdict.excused else ""
    skipped = sum(step.skipped for step in run.steps)
    final = run.eval
    cells = [
        *(name, layout, state),
        *(f"{d or 0:.1e}" for d in (verdict.max_loss_diff, verdict.max_grad_norm_diff)),
        f"{verdict.max_weight_diff or 0:.1e}",
        f"{final.perplexity:.6g}" if final and final.perplexity else "",
        str(skipped),
        f"{max(run.comm.bytes_per_step) / 2**20:.1f}" if run.comm else "",
    ]
    return f"| {' | '.join(cells)} |"


def table(found: Comparison) -> None:
    """All strategies of a comparison."""
    heads = ("loss", "gradient norm", "weights", "perplexity", "skipped", "MiB")
    print(
        f"| strategy | layout | state | {' | '.join(heads)} |\n|---|---|---|{'---:|' * len(heads)}"
    )
    for name, run in found.strategies.items():
        print(row(name, run, found))
    controls = [n for n in found.controls if "cut" in n]
    excused = sum(len(verdict.excused) for verdict in found.parity.values())
    print(
        f"\nControls that ran: {', '.join(controls) or 'none were needed'}; differences that they "
        f"excused: {excused}. Commit {found.machine['commit']}.\n"
    )


def repeat(folder: Path, strategy: str) -> str:
    """Whether two runs of one layout with dropout have the same losses, bit for bit."""
    runs = [
        compare(folder / f"dropout-{strategy}-{i}", DROPOUT, [strategy], 4).strategies[strategy]
        for i in (1, 2)
    ]
    first, second = ([step.loss for step in run.steps] for run in runs)
    return "the same bits" if first == second else f"DIFFERENT: {first} {second}"


def main() -> None:
    """Everything, in order."""
    folder = Path(sys.argv[1])
    print("# A GPT of 10.7 million parameters under every strategy\n")
    print(
        f"`{JOB}`: 30 steps, AdamW, warm-up and cosine, clipping 1.0, accumulation 4,\n"
        f"four processes of one thread each, gloo. {summarise_machine()}.\n"
        f"Command: `python -m benchmarks.gpt {folder}`.\n\n"
        "Differences: the greatest of any step (of any tensor at the end), relative to `single`,\n"
        "or for `local_sgd` to its emulation in one process. MiB: what the busiest rank sends a\n"
        'step. "Excused": past the tolerance at some step where control runs, the reference with '
        "its\nbatches cut otherwise, differ by at least a quarter as much.\n"
    )
    for name, changes in FLAVOURS.items():
        print(f"## {name}\n")
        table(compare(folder / name, changes, list(NAMES), 4))
    print("## Stages\n")
    for nproc in (2, 3):
        print(f"{nproc} processes:\n")
        table(compare(folder / f"stages-{nproc}", {}, ["pipeline"], nproc))
    print("## Dropout 0.1, two runs of one layout\n")
    for strategy in TWICE:
        print(f"- {strategy}: {repeat(folder, strategy)}")


if __name__ == "__main__":
    main()
