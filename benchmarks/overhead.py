"""What hybrid costs over hand-written loops: calls of a step, CPU time, ratios, beside its peers.

    python -m benchmarks.overhead --out out/overhead                 # hours; a quiet machine
    python -m benchmarks.overhead --out out/overhead --strategies ddp --workloads trivial,mnist

Run from the top folder. For each strategy and workload it starts ranks, in which every row trains
the same: the hand-written loop of `benchmarks/baselines/`, hybrid's engine, hybrid's whole loop,
and peers (Accelerate, Lightning Fabric, transformers' Trainer, torch.distributed.pipelining) where
they are installed. Losses must be equal first. Then calls are counted exactly, and CPU time is
taken in blocks that take turns, with the hand-written loop twice to show the noise. It writes
`overhead.json`, `overhead.md` and the ranks' output into the folder, and exits with 1 if a row was
refused (other losses than the hand-written loop's) or failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.launch.ops_cache import package_version

from .baselines import tables, verdicts
from .baselines.workloads import SHAPES, STRATEGIES
from .machine import summarise_machine

RANKS = {"single": 1, "2d": 4}
RANKS_ELSE = 2
SESSION_S, STOP_S = 2 * 3600.0, 40.0
TAIL_LINES = 5


def main() -> None:
    """Run all sessions, write what they found after each, and exit with 1 if something is wrong."""
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the ranks too
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "about": f"{summarise_machine()}, lightning-fabric {package_version('lightning-fabric')}. "
        "Ranks on this one host over gloo, one thread each.",
        "command": " ".join(["python -m benchmarks.overhead", *sys.argv[1:]]),
        "blocks": options.blocks,
        "sessions": [],
    }
    for workload in options.workloads:
        for strategy in options.strategies:
            session = run_session(strategy, workload, options)
            found["sessions"].append(session)
            found["claims"] = [vars(claim) for claim in verdicts.claims(found["sessions"])]
            (options.out / "overhead.json").write_text(json.dumps(found, indent=1))
            (options.out / "overhead.md").write_text(tables.write(found))
            print(summarise(session), flush=True)
    sys.exit(1 if problems(found["sessions"]) else 0)


def _parse() -> argparse.Namespace:
    def names(allowed: Sequence[str]) -> Any:
        def split(text: str) -> list[str]:
            chosen = text.split(",")
            if wrong := set(chosen) - set(allowed):
                valid = f"valid: {', '.join(allowed)}"
                raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))}: unknown; {valid}")
            return chosen

        return split

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategies", type=names(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--workloads", type=names(list(SHAPES)), default=list(SHAPES))
    parser.add_argument("--rows", type=names(list(tables.LOOPS)), default=[], help="only these")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a block")
    parser.add_argument("--small", action="store_true", help="two short blocks: see that it runs")
    parser.add_argument(
        "--more", default="", help="modules with loops of your own: make(workload, reads) -> step"
    )
    options = parser.parse_args()
    options.more = [module for module in options.more.split(",") if module]
    if options.small:
        options.blocks, options.seconds = 2, 0.02
    return options


def run_session(strategy: str, workload: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run the ranks of one strategy on one workload; return what they found, or why they failed."""
    ranks = RANKS.get(strategy, RANKS_ELSE)
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    log = options.out / f"{strategy}-{workload}.log"
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, log.open("w") as output:
        file = Path(folder) / "session.json"
        plan = {"strategy": strategy, "workload": workload, "blocks": options.blocks}
        plan |= {"seconds": options.seconds, "rows": options.rows, "more": options.more}
        command = [sys.executable, *(starter if ranks > 1 else [])]
        command += ["-m", "benchmarks.baselines.worker", json.dumps(plan | {"file": str(file)})]
        # What rows write goes into the folder too, since their loops end without cleaning up.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["TMPDIR"] = folder
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            process.wait(SESSION_S)
        except subprocess.TimeoutExpired:
            print(f"{strategy} {workload}: stopped after {SESSION_S:g} s", file=sys.stderr)
        finally:
            _stop(process)
        if file.exists():
            return json.loads(file.read_text())
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exit)\b", line)]
    why = errors[0] if errors else " / ".join(lines[-TAIL_LINES:])
    return {"strategy": strategy, "workload": workload, "reason": f"the ranks failed: {why}"}


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a session that still runs; torchrun ends its ranks if it is told to end."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def problems(sessions: list[dict[str, Any]]) -> list[str]:
    """List what is wrong: sessions that failed, and rows that were refused or failed."""
    found = []
    for session in sessions:
        where = f"{session['strategy']} {session['workload']}"
        if "rows" not in session:
            found.append(where)
        rows = session.get("rows", {}).items()
        found += [f"{where} {n}" for n, r in rows if r["status"] in ("refused", "failed")]
    return found


def summarise(session: dict[str, Any]) -> str:
    """Describe a session in one line."""
    wrong = problems([session])
    held = [claim.result for claim in verdicts.claims([session])]
    return (
        f"{session['strategy']} {session['workload']}: "
        f"{held.count(verdicts.YES)} of {len(held)} promises hold"
        + (f", {held.count(verdicts.VOID)} are void" if verdicts.VOID in held else "")
        + (f"; refused or failed: {', '.join(wrong)}" if wrong else "")
    )


if __name__ == "__main__":
    main()
