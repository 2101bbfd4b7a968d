"""Resumes each strategy's checkpoint under every strategy, and holds the run against others.

    python -m benchmarks.checkpoint_pairs --out DIR [--seed 0] [--strategies single,ddp,fsdp]

Run from the top folder; about ten minutes on two cores. The job is a small transformer of odd sizes
with tied weights and dropout: AdamW with warm-up and clipping, batches that do not divide. Each
strategy saves after step 6, and goes on. Each of all strategies resumes from there on a number of
processes that the seed draws from 1 to 4; a strategy also on the number that saved.

A pair holds if the hash of the state after loading is the one that was saved; if the next five
losses are those of the run that saved, within 1e-5 (bf16: its own tolerance); and if the verdict on
the whole run against `single`, never interrupted, is "equal". In the same layout the end must have
the same bits as that of a run that never stopped. Local SGD computes something else than the others
do: with it on one side, `single` or the emulation goes on from the same checkpoint, and is what the
steps and the verdict are held against.

DIR/pairs.jsonl has a row each, and a second start goes on behind them. DIR/checkpoint_pairs.md is
the page. The folders of pairs that do not hold stay in DIR."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid.job.errors import Unsupported
from hybrid.launch.warm import warm_ranks
from hybrid.layout import LayoutError
from hybrid.strategies.registry import NAMES
from hybrid.training.check import CheckedJob

from .checkpoint_pair_page import markdown
from .checkpoint_pair_runs import Pair, Pairs, check
from .machine import summarise_machine
from .verdicts import read_rows

WORLDS = (1, 2, 3, 4)


def find_worlds(checked: CheckedJob, name: str) -> tuple[list[int], str]:
    """Return on how many processes a strategy can run this job, and why it cannot on others."""
    found, why = [], ""
    for nproc in WORLDS:
        try:
            layout, _ = checked.plan(name, nproc)
        except (LayoutError, Unsupported) as error:
            why = str(error)
            continue
        if layout.world_size == nproc:
            found.append(nproc)
    return found, why


def draw_pairs(
    worlds: Mapping[str, Sequence[int]], precision: str, seed: int, few: bool = False
) -> list[Pair]:
    """Draw the sizes of all ordered pairs; a strategy with itself is there in the same size too.

    What saves has several processes where it can, since a checkpoint of one is not cut.
    few: one target for each strategy that saves."""
    draws = random.Random(f"{seed} {precision}")
    pairs = []
    for source, sizes in worlds.items():
        mine = draws.choice([n for n in sizes if n > 1] or [*sizes, 0][:1])
        targets = draws.sample(sorted(worlds), 1) if few else [*worlds]
        for target in targets:
            theirs = draws.choice(worlds[target]) if worlds[target] else 0
            pairs.append(Pair(source, mine, target, theirs, precision))
            if source == target and theirs != mine:
                pairs.append(Pair(source, mine, target, mine, precision))
    return pairs


def run_pairs(out: Path, names: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Run all pairs in fp32 and a few in bf16; return a row for each."""
    file = out / "pairs.jsonl"
    known = {row["pair"]: row for row in read_rows(file)}
    rows = []
    for precision in ("fp32", "bf16"):
        checked = check(precision)
        found = {name: find_worlds(checked, name) for name in names}
        worlds = {name: sizes for name, (sizes, _) in found.items()}
        pairs = Pairs(checked, out / precision)
        for pair in draw_pairs(worlds, precision, seed, few=precision != "fp32"):
            if pair.title not in known:
                why = [found[name][1] for name in (pair.source, pair.target) if not worlds[name]]
                known[pair.title] = row = pairs.refuse(pair, why[0]) if why else pairs.run(pair)
                with file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(f"{pair.title}: {row['outcome']}", file=sys.stderr, flush=True)
            rows.append(known[pair.title])
    return rows


def main() -> None:
    """Run the campaign and write its page; exit with 1 where a pair does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default=",".join(NAMES))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    names = given.strategies.split(",")
    with warm_ranks():
        rows = run_pairs(given.out, names, given.seed)
    command = shlex.join(["python", "-m", "benchmarks.checkpoint_pairs", *sys.argv[1:]])
    text = markdown(rows, names, command, summarise_machine())
    (given.out / "checkpoint_pairs.md").write_text(text)
    print(text)
    sys.exit(any(row["outcome"] == "broken" for row in rows))


if __name__ == "__main__":
    main()
