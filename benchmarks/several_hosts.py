"""Strategies and launchers on several hosts that benchmarks/hosts.py makes, as Markdown tables.

    python -m benchmarks.several_hosts > benchmarks/several_hosts.md

Run as root from the top folder; about half an hour on two cores. Differences are the greatest of a
loss at any step, relative to `single`; times are medians of timed steps; bytes are counted by the
kernel on each host's link and set against what the run counted of its collectives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hybrid
from hybrid import records
from hybrid.environment import summary
from hybrid.job_file import to_dict
from hybrid.records import Record

from .hosts import PORT, Hosts, address, why_not
from .launchers import largest

JOB = "launch/jobs/mlp.toml"
COPIES = {"parallel.replicate": 2, "parallel.shard": 2}
TWO_D = {"parallel.pp": 2, "parallel.dp": 2}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp, copies across hosts": ("fsdp", COPIES),
    "zero3": ("zero3", {}),
    "pipeline": ("pipeline", {}),
    "2d": ("2d", TWO_D),
}
RATES = {"unlimited": None, "1 Gbit/s": 1000.0, "100 Mbit/s": 100.0, "20 Mbit/s": 20.0}
RANKED = ("ddp", "fsdp", "zero2", "zero3", "pipeline")


def torchrun(host: int, hosts: int, ranks: int) -> list[str]:
    """What starts a host's ranks; the same for the functions below."""
    words = ["--nnodes", str(hosts), "--nproc-per-node", str(ranks), "--node-rank", str(host)]
    return ["torchrun", *words, "--master-addr", address(0), "--master-port", PORT, "-m", "hybrid"]


def accelerate(host: int, hosts: int, ranks: int) -> list[str]:
    """Accelerate's multi-machine mode."""
    words = ["--multi_gpu", "--num_processes", str(hosts * ranks), "--num_machines", str(hosts)]
    where = ["--main_process_ip", address(0), "--main_process_port", PORT]
    plain = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    rank = ["--machine_rank", str(host)]
    return ["accelerate", "launch", *words, *rank, *where, *plain, "-m", "hybrid"]


def deepspeed(host: int, hosts: int, ranks: int) -> list[str]:
    """DeepSpeed's launcher without ssh, on a hostfile of addresses."""
    file = Path(tempfile.gettempdir()) / f"hostfile-{os.getpid()}"
    file.write_text("".join(f"{address(i)} slots={ranks}\n" for i in range(hosts)))
    words = ["--hostfile", str(file), "--no_ssh", "--node_rank", str(host)]
    where = ["--master_addr", address(0), "--master_port", PORT]
    return ["deepspeed", *words, *where, "--module", "hybrid"]


LAUNCHERS = {"torchrun": torchrun, "accelerate": accelerate, "deepspeed --no_ssh": deepspeed}


def write_job(folder: Path, changes: dict[str, Any]) -> Path:
    """The job with changes, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    records.write(to_dict(hybrid.load_job(JOB, changes)), folder / "job.json")
    return folder / "job.json"


def finish(processes: Sequence[subprocess.Popen[bytes]], out: Path) -> Record | str:
    """The record, when all processes have ended well; else what went wrong."""
    deadline = time.monotonic() + 300
    try:
        codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        return "did not end within 300 s"
    if any(codes):
        lines = [x for log in out.glob("*.log") for x in log.read_text().splitlines()]
        return f"exit {codes}: {next((x for x in lines if x.startswith('hybrid: ')), '')[:90]}"
    return records.read(Record, out / "record.json")


def by_launcher(hosts: Hosts, ranks: int, launcher: str, name: str, out: Path) -> Record | str:
    """One run through a launcher on each host."""
    strategy, changes = RUNS[name]
    words = ["train", str(write_job(out, changes)), "--strategy", strategy, "--out", str(out)]
    started = [
        hosts.start(
            host,
            [*LAUNCHERS[launcher](host, hosts.count, ranks), *words],
            {"OMP_NUM_THREADS": "1"},
            out / f"host{host}.log",
        )
        for host in range(hosts.count)
    ]
    return finish(started, out)


def by_rank(
    hosts: Hosts, place: Sequence[int], strategy: str, changes: dict[str, Any], out: Path
) -> Record | str:
    """One run, rank r on host place[r], as a scheduler that places ranks one by one starts it."""
    words = ["train", str(write_job(out, changes)), "--strategy", strategy, "--out", str(out)]
    return finish(hosts.start_ranks(place, words, out), out)


def equality(folder: Path, single: Record) -> None:
    """Two hosts of two ranks under each launcher."""
    print("## Equal under each launcher: two hosts of two ranks\n")
    print(f"| | {' | '.join(LAUNCHERS)} |\n|---|{'---:|' * len(LAUNCHERS)}")
    with Hosts(2) as hosts:
        for name in RUNS:
            cells = []
            for launcher in LAUNCHERS:
                out = folder / f"{name}-{launcher}".replace(" ", "-")
                record = by_launcher(hosts, 2, launcher, name, out)
                shown = record
                if isinstance(record, Record):
                    shown = f"{largest(record, single):.1e}"
                cells.append(shown)
            print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)


def link_bytes(hosts: Hosts, place: Sequence[int], changes: dict[str, Any], out: Path) -> str:
    """Bytes a step on each link, of two runs of unlike length, and what the run counted."""
    sent, counted, seconds = [], [0.0] * hosts.count, 0.0
    for steps in (10, 40):
        before = [hosts.sent(host) for host in range(hosts.count)]
        record = by_rank(
            hosts, place, "2d", changes | {"train.steps": steps}, out / f"steps-{steps}"
        )
        if not isinstance(record, Record):
            return f"{record} | | |"
        sent.append([hosts.sent(host) - b for host, b in enumerate(before)])
        assert record.comm and record.throughput
        across = _crossing(record, place)
        counted = [
            sum(b for b, at in zip(across, place, strict=True) if at == host)
            for host in range(hosts.count)
        ]
        seconds = record.throughput.step_s_median
    measured = [(b - a) / 30 for a, b in zip(*sent, strict=True)]
    off = max(abs(m / c - 1) for m, c in zip(measured, counted, strict=True) if c)
    kib = [f"{m / 1024:.0f}" for m in measured], [f"{c / 1024:.0f}" for c in counted]
    return f"{', '.join(kib[0])} | {', '.join(kib[1])} | {off:.1%} | {1000 * seconds:.0f}"


def _crossing(record: Record, place: Sequence[int]) -> list[float]:
    """Bytes a step that each rank sends to another host: between stages where those lie apart, and
    between columns where these do."""
    dp = record.layout["dp"]
    stages_apart = len({place[rank] for rank in range(0, len(place), dp)}) > 1
    columns_apart = len(set(place[:dp])) > 1
    assert record.comm
    crossing = [0.0] * len(place)
    for op, numbers in record.comm.by_op.items():
        between_stages = op in ("send", "recv", "isend", "irecv")
        if stages_apart if between_stages else columns_apart:
            crossing = [a + b for a, b in zip(crossing, numbers["bytes"], strict=True)]
    return crossing


def placement(folder: Path) -> None:
    """2d on four hosts of two ranks, laid out both ways."""
    print("\n## 2d on four hosts of two ranks, links of 100 Mbit/s\n")
    print("KiB a step that each host sends.\n")
    print("| | measured | counted | off by at most | ms a step |\n|---|---|---|---:|---:|")
    ways = {
        "stages inside, columns across": ([0, 1, 2, 3, 0, 1, 2, 3], {"pp": 2, "dp": 4}),
        "columns inside, stages across": ([0, 0, 1, 1, 2, 2, 3, 3], {"pp": 4, "dp": 2}),
    }
    with Hosts(4, mbit=100) as hosts:
        for name, (place, degrees) in ways.items():
            changes = {f"parallel.{axis}": n for axis, n in degrees.items()}
            changes["train.epochs"] = None
            out = folder / name.replace(" ", "-")
            print(f"| {name} | {link_bytes(hosts, place, changes, out)} |", flush=True)


def ranking(folder: Path) -> None:
    """Four hosts of one rank at several rates."""
    print("\n## Which is fastest: four hosts of one rank, ms a step\n")
    print(f"| | {' | '.join(RANKED)} | fastest |\n|---|{'---:|' * len(RANKED)}---|")
    for rate, mbit in RATES.items():
        with Hosts(4, mbit) as hosts:
            found: dict[str, float] = {}
            for strategy in RANKED:
                changes = {"train.steps": 14, "train.epochs": None}
                out = folder / f"{strategy}-{rate}".replace(" ", "-").replace("/", "")
                record = by_rank(hosts, [0, 1, 2, 3], strategy, changes, out)
                if isinstance(record, Record) and record.throughput:
                    found[strategy] = 1000 * record.throughput.step_s_median
        cells = [f"{found[s]:.0f}" if s in found else "failed" for s in RANKED]
        best = min(found, key=lambda s: found[s]) if found else ""
        print(f"| {rate} | {' | '.join(cells)} | {best} |", flush=True)


def main() -> None:
    """All tables."""
    if reason := why_not():
        sys.exit(f"several_hosts: {reason}")
    print("# Several hosts\n")
    print(
        f"`{JOB}`; hosts are network namespaces of one machine, gloo. {summary()}.\n"
        "Command: `python -m benchmarks.several_hosts`, as root.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        single = hybrid.train(hybrid.load_job(JOB), "single")
        equality(root / "equality", single)
        placement(root / "placement")
        ranking(root / "ranking")


if __name__ == "__main__":
    main()
