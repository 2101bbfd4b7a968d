"""Peak memory of each rank where a model only just fits: one step in fp32 with SGD, as a table.

    python -m benchmarks.sizes --out out/sizes                  # the 1.3B GPT, of 21 GB of states
    python -m benchmarks.sizes --layers 12 --width 1024         # 0.17B, two minutes on two cores
    python -m benchmarks.sizes --on-meta --strategies fsdp      # ranks make their own first values

Run from the top folder. What a rank needs is its shard of parameters and gradients, 4 bytes each,
and the largest unit that is gathered. Two peaks are held against that: of live tensor storages from
the building of the engine on (`peak_bytes` of the record), and of resident memory of its own
(RssAnon of /proc/PID/status, read every 20 ms), less what that is once all is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import hybrid
from benchmarks.machine import summarise_machine
from hybrid.job.file import to_dict
from hybrid.models import build_model

RANKS, TOKENS, ALLOWED = 2, 8, 1.15
STRATEGIES = ("fsdp", "zero3", "pipeline", "ddp")


def make_job(layers: int, width: int, vocabulary: int, on_meta: bool) -> Any:
    """A GPT on two samples of eight tokens: all but its parameters is small."""
    sizes = {"num_layers": layers, "width": width, "num_heads": 16, "vocab_size": vocabulary}
    data = {"size": 2, "tokens": TOKENS, "vocab_size": 61}
    return hybrid.load_job(
        {
            "model": {
                "name": "gpt",
                "options": {**sizes, "context": TOKENS, "tied": False},
                "on_meta": on_meta,
            },
            "data": {"name": "tests.workloads:sentences", "options": data},
            "optimizer": {"name": "sgd", "lr": 0.001},
            "train": {"global_batch": 2, "steps": 1},
            "strategy": {"pipeline": {"partition": "parameters"}},
        }
    )


def needs(job: Any, name: str, record: dict[str, Any]) -> float:
    """Bytes of the fullest rank's parameters and gradients, and of its largest gathered unit."""
    with torch.device("meta"):
        layers, _ = build_model(job)
    parameters, largest = sum(p.numel() for p in layers.names()), max(layers.sizes())
    if name == "pipeline" and record.get("receipt"):
        return 8.0 * max(rank["parameters"] for rank in record["receipt"]["evidence"]["ranks"])
    return 8.0 * parameters if name == "ddp" else 8.0 * parameters / RANKS + 4.0 * largest


def own_bytes() -> int:
    """The resident memory that is this process's own: no file and no memory that it shares."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def run_rank(file: Path, command: list[str]) -> None:
    """Be one rank of `hybrid train`, and keep in a file by how much its own memory has grown."""
    import accelerate  # noqa: F401
    import deepspeed.pipe  # noqa: F401

    import hybrid.training.loop  # noqa: F401
    from hybrid.cli import main as run

    before, most = own_bytes(), 0
    file = file.with_suffix(f".{os.environ['LOCAL_RANK']}")

    def watch() -> None:
        nonlocal most
        while True:
            if (now := own_bytes() - before) > most:
                most = now
                file.write_text(str(most))
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv[1:] = command
    run()


def run(name: str, job: Any, out: Path) -> tuple[dict[str, Any], list[int]]:
    """Train the job; the record, and each rank's growth of resident memory in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    file, resident = out / "job.json", out / "resident"
    file.write_text(json.dumps(to_dict(job)))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc-per-node={RANKS}", "-m", "benchmarks.sizes", "--rank", str(resident)]
    words += ["train", str(file), "--strategy", name, "--out", str(out / "run")]
    subprocess.run(words, check=False, stdout=subprocess.DEVNULL, stderr=(out / "log").open("w"))
    grown = [int(resident.with_suffix(f".{rank}").read_text()) for rank in range(RANKS)]
    record: dict[str, Any] = json.loads((out / "run" / "record.json").read_text())
    return record, grown


def row(name: str, job: Any, record: dict[str, Any], grown: list[int]) -> str:
    """One line of the table."""
    need = needs(job, name, record)
    if record["status"] != "ok":
        cells = [name, f"{need / 1e9:.2f}", record["reason"].split(" (")[0], "", "", ""]
        return f"| {' | '.join(cells)} |"
    live = record["memory"]["peak_bytes"]
    cells = [
        name,
        f"{need / 1e9:.2f}",
        *(" ".join(f"{b / 1e9:.2f}" for b in x) for x in (live, grown)),
    ]
    cells += [f"{max(peaks) / need:.2f}" for peaks in (live, grown)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/sizes"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--on-meta", action="store_true", help="model.on_meta = true")
    options = parser.parse_args()
    job = make_job(options.layers, options.width, options.vocabulary, options.on_meta)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(job)[0].names())
    print(f"{parameters:,} parameters, {RANKS} ranks, fp32, SGD, one step; GB of the fullest rank.")
    print("| strategy | needs | live storages | resident | live / needs | resident / needs |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in options.strategies.split(","):
        print(row(name, job, *run(name, job, options.out / name)), flush=True)
    print(f"\n{summarise_machine()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
