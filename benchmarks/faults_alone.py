"""How ranks end that no launcher watches: three kinds of fault under seven strategies, as a table.

    python -m benchmarks.faults_alone

Run from the top folder; about six minutes on two cores. The ranks are started one by one, as a
scheduler does. Each must end by itself, whatever hangs, and all must name the one that failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hybrid import records
from hybrid.job.file import to_dict
from tests.conftest import small_job
from tests.ports import free_port

from .faults import (
    FAULTS,
    LIMIT_S,
    NPROC,
    SEED,
    STRATEGIES,
    draw_guilty,
    first_lines,
    leftovers,
    row_of,
    wait_for_fault,
)
from .machine import summarise_machine

KINDS = ("a rank raises", "a rank is killed", "a rank falls behind")
WITHIN_S = 2 * LIMIT_S + 12


def start_ranks(out: Path, strategy: str, plant: str) -> list[subprocess.Popen[bytes]]:
    """The ranks of a run with a fault (tests/failing.py), each with a log of its own in `out`."""
    limits = {"start_timeout_s": 60, "setup_timeout_s": 60, "collective_timeout_s": LIMIT_S}
    records.write(to_dict(small_job(train__steps=6, launch=limits)), out / "small.json")
    words = ["train", str(out / "small.json"), "--strategy", strategy, "--out", str(out)]
    command, ranks = [sys.executable, "tests/failing.py", plant, *words], []
    fixed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    for rank in range(NPROC):
        more = {"RANK": str(rank), "WORLD_SIZE": str(NPROC), "LOCAL_RANK": str(rank)}
        with (out / f"rank{rank}.log").open("wb") as log:
            environ = os.environ | fixed | more
            ranks.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
    return ranks


def check(strategy: str, kind: str, folder: Path) -> tuple[bool, str]:
    """Whether the ranks of one run ended as promised, and its row."""
    guilty, out = draw_guilty(kind, strategy), folder / f"{strategy}-{kind}".replace(" ", "-")
    ranks = start_ranks(out, strategy, f"{FAULTS[kind].plant}@{guilty}")
    others = [rank for rank in range(NPROC) if rank != guilty]
    codes = list[int | None]()
    try:
        wait_for_fault(out, None)
        codes = [ranks[rank].wait(timeout=120) for rank in others]
        if kind != "a rank falls behind":
            codes.append(ranks[guilty].wait(timeout=30))
    except subprocess.TimeoutExpired:
        codes.append(None)
    took = time.time() - (out / "fault").stat().st_mtime
    for process in ranks:
        process.kill()
        process.wait()
    firsts = first_lines(out, guilty)
    wrong = [first for first in firsts if f"because of rank {guilty} " not in first]
    left = leftovers(out)
    ok = codes[:3] == [1] * 3 and None not in codes and took <= WITHIN_S and not wrong and not left
    exits, first = ", ".join(map(str, codes)), (wrong or firsts)[0]
    return ok, row_of(strategy, kind, guilty, exits, took, first, left, ok, WITHIN_S)


def main() -> None:
    """All kinds under all strategies."""
    print("# How ranks end that no launcher watches\n")
    print(
        f"{NPROC} processes, gloo, timeouts of {LIMIT_S} s in the job; seed {SEED} draws the guilty"
        f" rank. {summarise_machine()}.\nCommand: `python -m benchmarks.faults_alone`. Exit: of the"
        " others, then of the guilty rank where it ends.\n"
    )
    print("| strategy | fault | rank | exit | seconds | first line | left behind | as promised |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for strategy in STRATEGIES:
                ok, row = check(strategy, kind, Path(folder))
                print(row, flush=True)
                results.append(ok)
    print(f"\n{sum(results)} of {len(results)} as promised.")


if __name__ == "__main__":
    main()
