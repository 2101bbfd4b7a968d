"""Trains for very many steps, and compares very many times, to see what grows.

    python -m benchmarks.soak --out FOLDER --strategies fsdp --steps 0 --gpt-steps 5000
    python -m benchmarks.soak --out FOLDER --single 200000     # that run alone

fsdp and zero3 have two ranks, 2d has four. While a run lasts, each rank's resident memory and CPU
time (psutil) are read at every hundredth of it. The first tenth is left out, in which allocators
and caches fill, and the end, at which the record is put together. Growth is that of a line fitted
through the rest, over its whole length. The time of a step is CPU time, since other processes
change wall time. FOLDER/soak.json and FOLDER/soak.md have the figures.

`--comparisons` is how many; 0 of a number leaves that part out.

`--single` trains the trivial model under `single` with every step in `steps.jsonl`, and says what a
step took in each tenth of the run, the size of its record, and the memory of reading all steps."""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil

import hybrid
from hybrid.launch.warm import warm_process, warm_ranks
from hybrid.records.steps import read_run
from hybrid.training.check import check_job
from hybrid.training.progress import Watcher
from hybrid.training.run import launch

from .machine import summarise_machine

STRATEGIES = ("fsdp", "zero3", "2d")
TRIVIAL: dict[str, Any] = {
    "model": {"name": "mlp", "options": {"sizes": [8, 8, 2]}},
    "data": {"name": "random", "options": {"samples": 4000, "features": 8, "classes": 2}},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "train": {"global_batch": 8, "micro_batches": 2},
}
GPT: dict[str, Any] = {
    "model": {
        "name": "gpt",
        "options": {"num_layers": 5, "width": 48, "num_heads": 3, "context": 32, "vocab_size": 101},
    },
    "data": {"name": "benchmarks.soak:tokens"},
    "optimizer": {"name": "adamw", "lr": 3e-4},
    "train": {"global_batch": 8, "micro_batches": 2, "clip_norm": 1.0},
}


def tokens() -> tuple[Any, Any]:
    """Make sets of random tokens, 32 to a sample, of a vocabulary of 101."""
    import torch
    from torch.utils.data import TensorDataset

    ids = torch.randint(0, 101, (512, 33), generator=torch.Generator().manual_seed(0))
    whole = TensorDataset(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    return whole, TensorDataset(*whole[:16])


class Sampler(Watcher):
    """Reads the memory and the CPU time of the ranks at every hundredth of a run."""

    def __init__(self, every: int) -> None:
        self.every, self.done, self.next = every, 0, 0
        self.seen: list[tuple[int, list[float], float]] = []  # steps done, MiB, CPU seconds

    def started(self, name: str, steps: int, out: Path) -> None:
        self.path, self.offset = out / "steps.jsonl", 0

    def poll(self) -> None:
        server = warm_process()
        if not self.path.exists() or server is None:
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            added = file.read()
        self.offset, self.done = self.offset + len(added), self.done + added.count(b"\n")
        if self.done < self.next:
            return
        self.next = self.done + self.every
        ranks = sorted(psutil.Process(server.process.pid).children(), key=lambda p: p.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = [rank.memory_info().rss / 2**20 for rank in ranks]
            times = [rank.cpu_times() for rank in ranks]
            self.seen.append((self.done, memory, sum(t.user + t.system for t in times)))


def growth(values: list[float]) -> float:
    """Return how much a fitted line rises over its length, relative to its start."""
    line = statistics.linear_regression(range(len(values)), values)
    return line.slope * (len(values) - 1) / line.intercept


def soak(
    name: str, sections: dict[str, Any], strategy: str, steps: int, out: Path
) -> dict[str, Any]:
    """Train for so many steps, and return how memory and the time of a step grew."""
    more = {"train.steps": steps, "launch.collective_timeout_s": 24 * 3600}
    job = check_job(hybrid.load_job(sections, more)).job
    ranks = 4 if strategy == "2d" else 2
    sampler, begun = Sampler(steps // 100), time.monotonic()
    record = launch(job, strategy, ranks, out / f"{name}_{strategy}", sampler)
    kept = [s for s in sampler.seen if len(s[1]) == ranks and steps * 0.1 <= s[0] < steps * 0.99]
    each = [
        (later[2] - sooner[2]) / (later[0] - sooner[0]) / ranks * 1e3
        for sooner, later in itertools.pairwise(kept)
    ]
    found = {
        "job": name,
        "strategy": strategy,
        "ranks": ranks,
        "steps": len(record.steps) + record.left_out.get("steps", 0),
        "minutes": (time.monotonic() - begun) / 60,
        "rss_mib": kept[0][1],
        "rss_growth": max(growth([memory[rank] for _, memory, _ in kept]) for rank in range(ranks)),
        "step_ms": statistics.median(each),
        "step_growth": growth(each),
        "spread": statistics.stdev(each) / statistics.median(each),
        "loss": [record.steps[0].loss, record.steps[-1].loss],
    }
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def long_run(steps: int, out: Path) -> str:
    """Train under `single` for so many steps, and return what that cost as a page's text."""
    job = check_job(hybrid.load_job(TRIVIAL, {"train.steps": steps})).job
    sampler, begun = Sampler(steps // 100), time.monotonic()
    launch(job, "single", 1, out, sampler)
    minutes = (time.monotonic() - begun) / 60
    sizes = [(out / name).stat().st_size for name in ("record.json", "steps.jsonl")]
    memory = [found[1][0] for found in sampler.seen if found[1]]
    tenths = list[list[float]]([] for _ in range(10))
    with (out / "steps.jsonl").open() as lines:
        for i, line in enumerate(lines):
            tenths[i * 10 // steps].append(json.loads(line)["seconds"])
    before = psutil.Process().memory_info().rss
    record = read_run(out)
    held = (psutil.Process().memory_info().rss - before) / 2**20
    rows = [
        f"| {i + 1} | {statistics.median(t) * 1e6:.0f} | {statistics.fmean(t) * 1e6:.0f} |"
        for i, t in enumerate(tenths)
    ]
    assert len(record.steps) == steps
    return "\n".join(
        [
            f"`single`, {steps:,} steps in {minutes:.1f} minutes, every step in `steps.jsonl`.",
            f"`record.json` has {sizes[0]:,} bytes, `steps.jsonl` {sizes[1]:,}. Resident memory of "
            f"the rank: {memory[len(memory) // 10]:.1f} MiB after a tenth, {memory[-1]:.1f} MiB at "
            f"the end. A reader of all steps, as a comparison is, takes {held:.0f} MiB more.",
            "",
            "| tenth of the run | median step, us | mean step, us |",
            "|---:|---:|---:|",
            *rows,
            "",
        ]
    )


def compare_often(times: int, out: Path) -> dict[str, Any]:
    """Compare so many times from one warm process, and return what stayed behind."""
    job = hybrid.load_job(TRIVIAL, {"train.steps": 3})
    here = psutil.Process()

    def state() -> dict[str, Any]:
        server = warm_process()
        assert server is not None
        forker = psutil.Process(server.process.pid)
        return {
            "children": len(here.children(recursive=True)),
            "files": here.num_fds() + forker.num_fds(),
            "rss_mib": [p.memory_info().rss / 2**20 for p in (here, forker)],
        }

    states = []
    for i in range(times):
        assert hybrid.compare(job, ["ddp", "zero2", "pipeline"], 2, out / "often").ok
        if i in (times // 10, times - 1):
            states.append(state())
    grown = [b / a - 1 for a, b in zip(states[0]["rss_mib"], states[1]["rss_mib"], strict=True)]
    return {
        "comparisons": times,
        "after_a_tenth": states[0],
        "at_the_end": states[1],
        "grown": grown,
    }


def markdown(found: dict[str, Any]) -> str:
    """Write the figures as a page."""
    rows = [
        f"| {r['job']} | {r['strategy']}, {r['ranks']} | {r['steps']:,} | "
        f"{max(r['rss_mib']):.0f} | {r['rss_growth']:+.2%} | {r['step_ms']:.2f} | "
        f"{r['step_growth']:+.1%} | {r['spread']:.1%} | {r['minutes']:.0f} |"
        for r in found["soaks"]
    ]
    lines = [
        "# What grows over very many steps and comparisons",
        "",
        f"`{found['command']}`: {found['machine']}.",
        "",
        "| job | strategy, ranks | steps | MiB of a rank | its growth | CPU ms a step and rank | "
        "its growth | spread of hundredths | minutes |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
    ]
    if often := found["often"]:
        first, last = often["after_a_tenth"], often["at_the_end"]
        grown = ", ".join(f"{one:+.2%}" for one in often["grown"])
        lines += [
            f"{often['comparisons']} comparisons of four runs in one command. After a tenth of "
            f"them: {first['children']} process beside it, {first['files']} open files. At the "
            f"end: {last['children']} and {last['files']}. Memory of the command and of the "
            f"process that forks: {grown}.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Soak, compare often, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--gpt-steps", type=int, default=5_000)
    parser.add_argument("--comparisons", type=int, default=200)
    parser.add_argument("--single", type=int, help="only this run, of so many steps")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.single:
        with warm_ranks():
            text = f"{summarise_machine()}\n\n{long_run(given.single, given.out / 'single')}"
        (given.out / "single.md").write_text(text)
        print(text)
        return
    with warm_ranks():
        soaks = [
            soak(name, sections, strategy, steps, given.out)
            for name, sections, steps in (
                ("trivial", TRIVIAL, given.steps),
                ("gpt", GPT, given.gpt_steps),
            )
            for strategy in given.strategies.split(",")
            if steps
        ]
        often = compare_often(given.comparisons, given.out) if given.comparisons else None
    found = {
        "command": "python -m benchmarks.soak " + " ".join(sys.argv[1:]),
        "machine": summarise_machine(),
        "soaks": soaks,
        "often": often,
    }
    (given.out / "soak.json").write_text(json.dumps(found, indent=1))
    (given.out / "soak.md").write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
