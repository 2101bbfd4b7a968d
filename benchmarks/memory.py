"""Peak memory of a rank under each strategy beside what theory says, as a Markdown table.

    python -m benchmarks.memory --out out/memory

Run from the top folder; three minutes on two cores. A GPT of 10 million parameters in fp32
under AdamW, on so few tokens that parameters, gradients and moments (4, 4 and 8 bytes) outweigh
activations. Figures are printed for runs that equal `single` only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import hybrid
from hybrid.measure.machine import describe_machine
from hybrid.measure.memory import StorageMeter
from hybrid.models import build_model
from hybrid.models.layers import Layers
from hybrid.records import Record

STRATEGIES = ("ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d")
BATCH, TOKENS, VOCABULARY = 4, 8, 256
JOB: dict[str, Any] = {
    "model": {
        "name": "gpt",
        "options": {
            "num_layers": 16,
            "width": 224,
            "num_heads": 7,
            "context": TOKENS,
            "vocab_size": VOCABULARY,
        },
    },
    "data": {
        "name": "tests.workloads:sentences",
        "options": {"size": 48, "tokens": TOKENS, "vocab_size": VOCABULARY},
    },
    # An eps above the rounding of gradients: else AdamW makes whole steps of it, which differ.
    "optimizer": {"name": "adamw", "lr": 0.001, "eps": 1e-2},
    "train": {"global_batch": BATCH, "steps": 6},
    "strategy": {
        "local_sgd": {"sync_every": 2},
        "pipeline": {"partition": "parameters"},
        "2d": {"partition": "parameters"},
    },
}


def theory(name: str, record: Record, layers: Layers) -> tuple[float, float]:
    """Bytes on the fullest rank of parameters, their gradients and moments, as the strategy is
    published; and what its engine is known to keep beside them (benchmarks/memory.md)."""
    parameters, largest = sum(p.numel() for p in layers.names()), max(layers.sizes())
    bucket = 4.0 * parameters / 16
    if name == "single":
        return 16.0 * parameters, 0.0
    shard = record.layout["shard"]
    if record.layout["pp"] > 1:
        parameters = max(rank["parameters"] for rank in record.receipt.evidence["ranks"])
        if shard == 1:
            return 16.0 * parameters, bucket
        name = "zero1"
    whole, part = 4.0 * parameters, 4.0 * parameters / shard
    return {
        "zero1": (2 * whole + 2 * part, 2 * part),
        "zero2": (whole + 3 * part, 2 * part),
        "zero3": (4 * part, 2 * part),
        "fsdp": (4 * part, 4 * 4.0 * largest),
    }.get(name, (4 * part, 0.0))


def activations(job: Any) -> int:
    """Bytes that one process keeps between forward and backward of the whole batch, measured."""
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    meter = StorageMeter()
    with meter:
        layers, loss = build_model(job)
        model = layers.whole()
    held = meter.live_bytes
    with meter:
        kept = loss(model(ids), ids)
    assert kept
    return meter.live_bytes - held


def row(name: str, nproc: int, record: Record, layers: Layers) -> str:
    """One line of the table."""
    published, own = theory(name, record, layers)
    peaks = record.memory.step_peak_bytes
    cells = [
        name,
        str(nproc),
        f"{published / 1e6:.1f}",
        f"{own / 1e6:.1f}",
        " ".join(f"{peak / 1e6:.1f}" for peak in peaks),
        f"{max(peaks) / published:.2f}",
        f"{max(peaks) / (published + own):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/memory"))
    parser.add_argument("--nproc", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    options = parser.parse_args()
    job = hybrid.load_job(JOB)
    with torch.device("meta"):
        layers, _ = build_model(job)
    parameters = sum(p.numel() for p in layers.names())
    rows = []
    for nproc in options.nproc:
        names = options.strategies.split(",")
        result = hybrid.compare(job, names, nproc=nproc, out=options.out / str(nproc))
        for name, record in result.strategies.items():
            if record.status == "not_possible" or (name == "single" and rows):
                continue
            if not result.parity[name].ok:
                raise SystemExit(f"{name} on {nproc}: {record.reason or result.parity[name]}")
            rows.append(row(name, 1 if name == "single" else nproc, record, layers))
    print(f"{parameters:,} parameters, {16 * parameters / 1e6:.1f} MB with gradients and moments.")
    print(f"Of the batch one process alone keeps {activations(job) / 1e6:.1f} MB of activations.\n")
    print("| strategy | processes | theory MB | engine's own MB | measured MB, each rank |", end="")
    print(" measured / theory | measured / both |\n|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))
    here = describe_machine()
    versions = ", ".join(f"{k} {v}" for k, v in here["packages"].items() if k != "hybrid")
    print(f"\n{here['processor']}, {here['cores']} cores, {here['system']}, {versions},")
    print(f"Python {here['python']}, commit {here['commit']}.")


if __name__ == "__main__":
    main()
