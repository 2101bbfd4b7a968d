"""Plays ranks of a 7B GPT as HSDP 256 x 64 and compares what they hold and send with a closed form.

    python -m benchmarks.dry_run [--ranks first,last,9999]

Run from the top folder; some twenty seconds a rank, under 1 GiB. Each rank is a `hybrid dry-run` of
its own. The closed form below knows the shapes of the model and how FSDP2 cuts them, and nothing of
the engine. Any difference, a minute or 8 GiB end the command with status 1. Without --ranks: the
first rank, the last one and one that is drawn."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from .machine import summarise_machine

ROOT = Path(__file__).parent.parent
FP32, FP64 = 4, 8
NUMBERS = 13  # that the ranks tell one another of a step: a row of 12, and the count of targets
MOST_S, MOST_BYTES = 60, 8 * 2**30
REPLICATE, SHARD = 256, 64
JOB = """
[model]
name = "gpt"
options = {{ preset = "6.7b" }}
[data]
name = "benchmarks.dry_run:tokens"
options = {{ samples = {world}, context = 2048, vocab_size = 50257 }}
[optimizer]
name = "adamw"
lr = 1e-4
[train]
global_batch = {world}
steps = 10
[parallel]
replicate = {replicate}
shard = {shard}
"""


class Tokens(Dataset[Any]):
    """Draws the tokens of each sample when it is read."""

    def __init__(self, samples: int, context: int, vocab_size: int) -> None:
        self.samples, self.context, self.vocab_size = samples, context, vocab_size

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(i)
        drawn = torch.randint(self.vocab_size, (self.context + 1,), generator=draw)
        return drawn[:-1], drawn[1:]


def tokens(samples: int, context: int, vocab_size: int) -> tuple[Tokens, Tokens]:
    """Make train and test sets of random tokens, int64 [context], that take no memory."""
    return Tokens(samples, context, vocab_size), Tokens(1, context, vocab_size)


class Sizes(NamedTuple):
    """Holds the sizes of a GPT with tied embeddings, and of the mesh."""

    layers: int
    width: int
    vocab_size: int
    replicate: int
    shard: int


def shapes(sizes: Sizes) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of the parameters of each FSDP2 unit: the blocks, then the root."""
    d, last = sizes.width, sizes.layers + 1
    block: dict[str, tuple[int, ...]] = {
        "norm1.weight": (d,), "norm1.bias": (d,), "attention.qkv.weight": (3 * d, d),
        "attention.out.weight": (d, d), "attention.out.bias": (d,), "norm2.weight": (d,),
        "norm2.bias": (d,), "up.weight": (4 * d, d), "up.bias": (4 * d,),
        "down.weight": (d, 4 * d), "down.bias": (d,),
    }  # fmt: skip
    units = [{f"{i}.{name}": s for name, s in block.items()} for i in range(1, last)]
    tied = {"0.token.weight": (sizes.vocab_size, d)}
    return [*units, tied | {f"{last}.norm.weight": (d,), f"{last}.norm.bias": (d,)}]


def rows_of(rows: int, shard: int, place: int) -> int:
    """Return how many rows the shard at a place has: each has ceil(rows / shard), the last less."""
    each = -(-rows // shard)
    return max(0, min(rows, (place + 1) * each) - place * each)


def expected_shards(sizes: Sizes, rank: int) -> dict[tuple[str, str], tuple[list[int], int]]:
    """Return local shape and bytes of each parameter and moment, by name and key."""
    found = {}
    for name, shape in [item for unit in shapes(sizes) for item in unit.items()]:
        local = [rows_of(shape[0], sizes.shard, rank % sizes.shard), *shape[1:]]
        for key in ("weight", "exp_avg", "exp_avg_sq"):
            found[name, key] = local, FP32 * math.prod(local)
    return found


def expected_collectives(sizes: Sizes) -> dict[tuple[str, int], tuple[int, int]]:
    """Return calls and bytes by operation and group: of whole tensors, each shard padded alike.

    All units are gathered for the forward pass, and for the backward pass all but the root, which
    stays gathered. A unit's gradients are scattered, and each shard is summed over the replicas."""
    units = [
        sum(-(-s[0] // sizes.shard) * math.prod(s[1:]) for s in unit.values()) * sizes.shard * FP32
        for unit in shapes(sizes)
    ]
    calls, whole, world = len(units), sum(units), sizes.replicate * sizes.shard
    return {
        ("all_gather", sizes.shard): (2 * calls - 1, 2 * whole - units[-1]),
        ("reduce_scatter", sizes.shard): (calls, whole),
        ("all_reduce", sizes.replicate): (calls, whole // sizes.shard),
        ("all_gather", world): (1, NUMBERS * FP64 * world),
    }


def differences(found: dict[str, Any], sizes: Sizes) -> list[str]:
    """Return how the JSON of a dry-run differs from the closed form, a line each."""
    wanted = expected_shards(sizes, found["rank"])
    names = {name for name, _ in wanted}
    kept = [s for s in found["shards"] if s["name"] in names and s["key"] != "step"]
    shards = {(s["name"], s["key"]): (s["local_shape"], s["bytes"]) for s in kept}
    sent = {(c["op"], c["group_size"]): (c["calls"], c["bytes"]) for c in found["collectives"]}
    here = sum(size // FP32 for (_, key), (_, size) in wanted.items() if key == "weight")
    total = sum(math.prod(s) for unit in shapes(sizes) for s in unit.values())
    pairs = {
        "shards": (shards, wanted),
        "collectives": (sent, expected_collectives(sizes)),
        "parameters_here": (found["parameters_here"], here),
        "parameters_total": (found["parameters_total"], total),
    }
    return [f"{what}: {got}, not {want}" for what, (got, want) in pairs.items() if got != want]


def play(job: Path, rank: int, world: int) -> tuple[dict[str, Any], float, int]:
    """Run one `hybrid dry-run`; return its JSON, seconds, and the bytes resident at its peak."""
    words = ["dry-run", str(job), "--strategy", "fsdp", "--world", str(world), "--rank", str(rank)]
    start = time.monotonic()
    command = [sys.executable, "-m", "hybrid", *words, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        text = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(text), time.monotonic() - start, used.ru_maxrss * 1024


def main() -> int:
    """Play the ranks, and print a table row for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--ranks", default="first,last,drawn")
    world = REPLICATE * SHARD
    named = {"first": 0, "last": world - 1, "drawn": random.randrange(1, world - 1)}
    ranks = [named[w] if w in named else int(w) for w in parser.parse_args().ranks.split(",")]
    sizes, failed = Sizes(32, 4096, 50257, REPLICATE, SHARD), 0
    print(summarise_machine())
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.toml"
        job.write_text(JOB.format(world=world, replicate=REPLICATE, shard=SHARD))
        for rank in ranks:
            found, seconds, resident = play(job, rank, world)
            problems = differences(found, sizes)
            failed |= bool(problems) or seconds > MOST_S or resident > MOST_BYTES
            print(
                f"| {rank} | {found['parameters_here']:,} | {found['memory_bytes']:,} | "
                f"{seconds:.1f} | {resident / 2**30:.2f} | {'; '.join(problems) or 'equal'} |",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
