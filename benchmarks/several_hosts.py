"""Strategies and launchers on several hosts that benchmarks/hosts.py makes, as Markdown tables.

    python -m benchmarks.several_hosts > benchmarks/several_hosts.md

Run as root from the top folder; about half an hour on two cores. Differences are the greatest of a
loss at any step, relative to `single`; times are medians of timed steps; bytes are counted by the
kernel on each host's link, headers and all.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hybrid
from hybrid import records
from hybrid.job.file import to_dict
from hybrid.job.schema import Job
from hybrid.layout import Layout
from hybrid.records import Record

from .hosts import PORT, SSH_TOOLS, Hosts, why_not
from .launchers import largest
from .machine import summarise_machine

SIZES = [784, 512, 512, 512, 10]
CHANGES = {
    "model.options": {"sizes": SIZES, "activation": "tanh"},
    "train.epochs": None,
    "train.steps": 20,
    "strategy.2d.zero_stage": 0,
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "fsdp, 2 copies across x 2 shards inside": (
        "fsdp",
        {"parallel.replicate": 2, "parallel.shard": 2},
    ),
    "zero3": ("zero3", {}),
    "pipeline": ("pipeline", {}),
    "2d, stages across": ("2d", {"parallel.pp": 2, "parallel.dp": 2}),
}
# The scripts in launch/: started on each host, or on the first alone.
ON_EACH = {
    "torchrun": {"SCRIPT": "shell/torchrun_hosts.sh", "NPROC": "2"},
    "accelerate": {"SCRIPT": "shell/accelerate_hosts.sh", "NPROC": "2"},
    "deepspeed, no ssh": {"SCRIPT": "shell/deepspeed_hosts.sh"},
}
ON_FIRST = {
    "deepspeed over pdsh": {"SCRIPT": "shell/deepspeed_hosts.sh", "NEEDS": "pdsh"},
    "Open MPI": {"SCRIPT": "mpi/openmpi.sh", "NPROC": "4", "MPIRUN": "mpirun.openmpi"},
    "MPICH": {"SCRIPT": "mpi/mpich.sh", "NPROC": "4", "MPIRUN": "mpirun.mpich"},
}
RATES = {"unlimited": None, "1 Gbit/s": 1000, "100 Mbit/s": 100, "20 Mbit/s": 20}
RANKED = ("ddp", "fsdp", "zero2", "zero3", "pipeline")
AGAIN = f"{RANKED[0]} again"  # how far two runs of the same lie apart
RANKED_STEPS = 9  # the last six are timed
# Two micro-batches a stage for the pipeline; the others accumulate as the job says.
RANKED_JOB = {"train.global_batch": 400, "strategy.pipeline.micro_batches": 8}


def the_job(changes: dict[str, Any]) -> Job:
    """The job of all tables, with changes."""
    return hybrid.load_job("launch/jobs/mlp.toml", CHANGES | changes)


def write_job(folder: Path, changes: dict[str, Any]) -> Path:
    """The job with changes, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    records.write(to_dict(the_job(changes)), folder / "asked.json")
    return folder / "asked.json"


def finish(processes: Sequence[subprocess.Popen[bytes]], out: Path) -> Record | str:
    """The record, when all processes have ended well; else what went wrong."""
    deadline = time.monotonic() + 300
    try:
        codes = [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()  # its ranks end with it
        return "did not end within 300 s"
    if any(codes):
        lines = [x for log in out.glob("*.log") for x in log.read_text().splitlines()]
        said = [x for x in lines if x.startswith("hybrid: ")] or lines[-1:] or [""]
        return f"exit {codes}: {said[0][:90]}"
    return records.read(Record, out / "record.json")


def by_script(hosts: Hosts, ssh: dict[str, str], launcher: str, name: str, out: Path) -> Any:
    """One run on hosts of two ranks by a script of launch/: the record, or why there is none."""
    settings = (ON_EACH | ON_FIRST)[launcher]
    needed = settings.get("MPIRUN", settings.get("NEEDS", "sh"))
    if not shutil.which(needed):
        return f"{needed} is not installed"
    strategy, changes = RUNS[name]
    variables = (
        settings
        | ssh
        | {
            "JOB": str(write_job(out, changes)),
            "STRATEGY": strategy,
            "OUT": str(out),
            "HOSTFILE": "launch/hostfile",
            "MASTER_ADDR": "node1",
            "MASTER_PORT": PORT,
            "OMP_NUM_THREADS": "1",
        }
    )
    script = [f"launch/{settings['SCRIPT']}"]
    where = range(hosts.count) if launcher in ON_EACH else [0]
    started = []
    for host in where:
        rank = {"NODE_RANK": str(host)} if launcher in ON_EACH else {}
        started.append(hosts.start(host, script, variables | rank, out / f"host{host}.log"))
    return finish(started, out)


def by_rank(
    hosts: Hosts, place: Sequence[int], strategy: str, changes: dict[str, Any], out: Path
) -> Record | str:
    """One run, rank r on host place[r], as a scheduler that places ranks one by one starts it."""
    words = ["train", str(write_job(out, changes)), "--strategy", strategy, "--out", str(out)]
    return finish(hosts.start_ranks(place, words, out), out)


def equality(folder: Path) -> None:
    """Two hosts of two ranks under each launcher."""
    launchers = [*ON_EACH, *ON_FIRST]
    print("## Equal under each launcher: two hosts of two ranks\n")
    print(f"| | {' | '.join(launchers)} |\n|---|{'---:|' * len(launchers)}")
    single = hybrid.train(the_job({}), "single")
    with Hosts(2) as hosts:
        ssh = hosts.start_ssh()
        for name in RUNS:
            cells = []
            for launcher in launchers:
                out = folder / f"{name}-{launcher}".replace(" ", "-").replace(",", "")
                record = by_script(hosts, ssh, launcher, name, out)
                if isinstance(record, Record):
                    cells.append(f"{largest(record, single):.1e}")
                else:
                    cells.append(str(record))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def predicted_bytes(layout: Layout, batch: int, place: Sequence[int]) -> list[float]:
    """Bytes a step that each host sends to others, of the layout alone: `SIZES` cut into stages of
    as many layers each, in fp32. A ring all-reduce over n columns sends 2 (n - 1) / n of a stage's
    parameters (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md); between stages
    go the activations of the whole batch and their gradients, each column's own."""
    cuts = [stage * (len(SIZES) - 1) // layout.pp for stage in range(layout.pp + 1)]
    sent = [0.0] * (max(place) + 1)
    for rank, host in enumerate(place):
        stage, column = layout.stage(rank), layout.dp_rank(rank)
        layers = range(cuts[stage], cuts[stage + 1])
        parameters = sum((SIZES[i] + 1) * SIZES[i + 1] for i in layers)
        if {place[layout.dp * stage + other] for other in range(layout.dp)} != {host}:
            sent[host] += 4 * parameters * 2 * (layout.dp - 1) / layout.dp
        for other, at in ((stage + 1, cuts[stage + 1]), (stage - 1, cuts[stage])):
            if 0 <= other < layout.pp and place[other * layout.dp + column] != host:
                sent[host] += 4 * SIZES[at] * batch / layout.dp
    return sent


def link_bytes(hosts: Hosts, place: Sequence[int], changes: dict[str, Any], out: Path) -> str:
    """A row: KiB a step on each link, from two runs of unlike length, beside the prediction."""
    sent, shorter, longer = [], 5, 20
    for steps in (shorter, longer):
        before = [hosts.sent(host) for host in range(hosts.count)]
        record = by_rank(hosts, place, "2d", changes | {"train.steps": steps}, out / f"{steps}")
        if not isinstance(record, Record):
            return f"{record} | | | |"
        sent.append([hosts.sent(host) - b for host, b in enumerate(before)])
    job = the_job(changes | {"train.steps": longer})
    single = hybrid.train(job, "single")
    measured = [(b - a) / (longer - shorter) for a, b in zip(*sent, strict=True)]
    predicted = predicted_bytes(Layout(**record.layout), job.train.global_batch, place)
    off = max((m / c - 1 for m, c in zip(measured, predicted, strict=True)), key=abs)
    cells = [", ".join(f"{x / 1024:.0f}" for x in row) for row in (measured, predicted)]
    assert record.throughput
    ms = 1000 * record.throughput.step_s_median
    return f"{' | '.join(cells)} | {off:+.1%} | {ms:.0f} | {largest(record, single):.1e}"


def placement(folder: Path) -> None:
    """2d on four hosts of two ranks, laid out both ways."""
    print("\n## 2d on four hosts of two ranks, both ways\n")
    print(
        "KiB a step that each host sends. tbf cuts what it delays into packets with a header each"
    )
    print(
        "(66 bytes in 1,514, and an answer of as many to every other one); else the kernel passes"
    )
    print("64 KiB at a time.\n")
    print("| links | | measured | predicted | off by at most | ms a step | difference |")
    print("|---|---|---|---|---:|---:|---:|")
    ways = {
        "stages inside, columns across": ([0, 1, 2, 3, 0, 1, 2, 3], 2, 4),
        "columns inside, stages across": ([0, 0, 1, 1, 2, 2, 3, 3], 4, 2),
    }
    for rate in ("unlimited", "100 Mbit/s"):
        with Hosts(4, RATES[rate]) as hosts:
            for name, (place, pp, dp) in ways.items():
                degrees = {"parallel.pp": pp, "parallel.dp": dp, "train.global_batch": 1000}
                out = folder / f"{rate}-{name}".replace(" ", "-").replace("/", "")
                row = link_bytes(hosts, place, degrees, out)
                print(f"| {rate} | {name} | {row} |", flush=True)


def measured_mbit(hosts: Hosts, out: Path) -> str:
    """What `hybrid doctor` measures of a link between two hosts, in Mbit/s: the median."""
    out.mkdir(parents=True)
    ranks = hosts.start_ranks(range(hosts.count), ["doctor", "--json"], out)
    codes = [rank.wait(timeout=300) for rank in ranks]
    said = (out / "rank0.log").read_text()
    if any(codes):
        return f"exit {codes}"
    links = json.loads(said[said.index("{\n") :])["links"]
    return f"{statistics.median(link['bytes_per_s'] for link in links) * 8e-6:,.0f}"


def ranking(folder: Path) -> None:
    """Four hosts of one rank at several rates; the last run is the first's strategy again."""
    columns = [*RANKED, AGAIN]
    print("\n## Which is fastest: four hosts of one rank, ms a step\n")
    print("Batches of 400, in 4 micro-batches, in the pipeline in 8.\n")
    print(f"| links | measured Mbit/s | {' | '.join(columns)} | fastest |")
    print(f"|---|---:|{'---:|' * len(columns)}---|")
    for rate, mbit in RATES.items():
        found: dict[str, float] = {}
        place = folder / rate.replace(" ", "-").replace("/", "")
        with Hosts(4, mbit) as hosts:
            speed = measured_mbit(hosts, place / "doctor")
            for column in columns:
                strategy, changes = (
                    column.removesuffix(" again"),
                    {"train.steps": RANKED_STEPS} | RANKED_JOB,
                )
                out = place / column.replace(" ", "-")
                record = by_rank(hosts, [0, 1, 2, 3], strategy, changes, out)
                if isinstance(record, Record) and record.throughput:
                    found[column] = 1000 * record.throughput.step_s_median
        cells = [f"{found[c]:,.0f}" if c in found else "failed" for c in columns]
        best = min((c for c in RANKED if c in found), key=lambda c: found[c], default="")
        print(f"| {rate} | {speed} | {' | '.join(cells)} | {best} |", flush=True)


def main() -> None:
    """All tables."""
    if reason := why_not(*SSH_TOOLS):
        sys.exit(f"several_hosts: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no host is left
    print("# Several hosts\n")
    print(
        f"`launch/jobs/mlp.toml` with layers of {SIZES}; hosts are network namespaces of one "
        f"machine, gloo, one thread a rank. {summarise_machine()}.\n"
        "Command: `python -m benchmarks.several_hosts`, as root.\n"
    )
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        equality(root / "equality")
        placement(root / "placement")
        ranking(root / "ranking")


if __name__ == "__main__":
    main()
