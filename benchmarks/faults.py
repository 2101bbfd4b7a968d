"""How runs end whatever befalls a rank: twelve kinds of fault under seven strategies, as a table.

    python -m benchmarks.faults > benchmarks/faults.md
    python -m benchmarks.faults --hangs      # six places in which a rank hangs instead
    python -m benchmarks.faults --only "2d,a rank raises"

Run from the top folder; about forty minutes on two cores. Four ranks train, and a seed draws the
one that fails. Each run must end within its stated time, with the expected status, name that rank
as the first cause, and leave no process and no lock. After all of them each strategy trains once
more. The link is cut between hosts that benchmarks/hosts.py makes, which needs root; there each
rank ends by itself, as in benchmarks/faults_alone.py.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from hybrid import records
from hybrid.job.file import to_dict
from hybrid.launch.ops_cache import ops_folder
from tests.conftest import small_job
from tests.test_failures import ranks_of, start_train

from .hosts import Hosts, why_not
from .machine import summarise_machine

STRATEGIES = ("ddp", "fsdp", "zero2", "zero3", "pipeline", "2d", "local_sgd")
NPROC = 4
SEED = 14
LIMIT_S = 6  # launch.start_timeout_s and launch.collective_timeout_s of the runs
# launch.start_timeout_s where all ranks come, four of them on two cores; launch.setup_timeout_s
START_LIMIT_S = 30
START_S = 120  # from the command to the fault at most, on two cores


class Fault(NamedTuple):
    """What is planted (tests/failing.py) or sent; how the command must end, within how long of
    the fault, and what its first line about it must say, where N is the guilty rank."""

    plant: str
    sent: int | None
    status: int
    within_s: float
    words: str


STEP = r"\(in step 2\)"
LATE_S = LIMIT_S + 12
SILENT = rf"rank N .*no sign of life.*{STEP}"
BEHIND = rf"rank N .*did not join the others.*failing.py:.*{STEP}"
CUT = "a cut link"
FAULTS = {
    "a rank raises": Fault("raises", None, 1, 8, rf"rank N .*the sky fell {STEP}"),
    "a rank is killed": Fault("is_killed", None, 1, 8, rf"rank N .*SIGKILL.*{STEP}"),
    "out of memory": Fault("has_no_memory", None, 1, 8, "rank N .*out of memory in step 2"),
    "a rank is stopped": Fault("is_stopped", None, 1, LATE_S, SILENT),
    "a rank falls behind": Fault("falls_behind", None, 1, LATE_S, BEHIND),
    "a rank never starts": Fault(
        "never_starts",
        None,
        1,
        LATE_S,
        r"rank N .*(ranks N of 4 did not start|did not come to the meeting)",
    ),
    "a wrong rendezvous": Fault(
        "goes_elsewhere", None, 1, LATE_S, "rank N .*(no meeting of|ranks N of 4 did not start)"
    ),
    "a taken port": Fault("port_is_taken", None, 1, LATE_S, "rank 0 .*cannot listen on"),
    "SIGTERM": Fault("nothing", signal.SIGTERM, 143, 8, ""),
    "Ctrl-C": Fault("nothing", signal.SIGINT, 130, 8, "hybrid: interrupted"),
    "the launcher is killed": Fault("nothing", signal.SIGKILL, -9, 8, ""),
    CUT: Fault("nothing", None, 1, 2 * LIMIT_S + 12, "because of rank N .*in step"),
}
HANGS = {
    "sleeps in the model": Fault("sleeps_in_forward", None, 1, LATE_S, BEHIND),
    "sleeps in the data": Fault(
        "sleeps_in_getitem", None, 1, LATE_S, BEHIND.replace("step 2", "step 3")
    ),
    "sleeps in the loss": Fault("sleeps_in_loss", None, 1, LATE_S, BEHIND),
    "loops in Python": Fault("loops_in_python", None, 1, LATE_S, BEHIND),
    "loops in C": Fault("loops_in_c", None, 1, LATE_S, SILENT),
    "skips a collective": Fault("skips_a_collective", None, 1, LATE_S, "rank N "),
}
NO_FAULT = Fault("nothing", None, 0, 0, "")


def draw_guilty(kind: str, strategy: str) -> int:
    """The rank that fails, by the seed, kind and strategy."""
    # A pipeline's last stage alone has a loss, which the last column of ranks holds.
    able = [2, 3] if strategy == "2d" else [3] if strategy == "pipeline" else range(NPROC)
    able = able if kind == "sleeps in the loss" else range(NPROC)
    return random.Random(f"{SEED} {kind} {strategy}").choice(able)


def start(
    out: Path, strategy: str, fault: Fault, guilty: int, waits: bool = False
) -> subprocess.Popen[str]:
    """The run with its fault, in the background; waits: not long for ranks that do not come."""
    limits = {
        "start_timeout_s": LIMIT_S if waits else START_LIMIT_S,
        "setup_timeout_s": START_LIMIT_S,
        "collective_timeout_s": LIMIT_S,
    }
    steps = 6 if fault.sent is None else 100_000
    plant = f"{fault.plant}@{guilty}"
    return start_train(out, strategy, steps, nproc=NPROC, fault=plant, launch=limits)


def wait_for_fault(out: Path, run: subprocess.Popen[str] | None, steps: int = 0) -> float:
    """When the fault came, in seconds of `time.time`: its file's time, or that of so many steps."""
    deadline = time.monotonic() + 2 * START_S
    file = out / ("steps.jsonl" if steps else "fault")
    while time.monotonic() < deadline:
        if file.exists() and (not steps or len(file.read_text().splitlines()) >= steps):
            break
        if run is not None and run.poll() is not None:
            break
        time.sleep(0.05)
    return file.stat().st_mtime if file.exists() and not steps else time.time()


def leftovers(out: Path) -> str:
    """Processes and locks of a run that are still there, after a moment to end."""
    deadline = time.monotonic() + 5
    while (left := ranks_of(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return "; ".join([*left, *(str(path) for path in ops_folder().glob("**/lock"))])


def first_lines(out: Path, guilty: int) -> list[str]:
    """What each of the other ranks says first of a rank, by its log in `out`."""
    logs = [out / f"rank{rank}.log" for rank in range(NPROC) if rank != guilty]
    said = [log.read_text(errors="replace").splitlines() for log in logs]
    return [next((line for line in lines if line.startswith("hybrid: rank")), "") for lines in said]


def row_of(
    strategy: str, kind: str, guilty: int, exits: str, took: float, first: str, left: str, ok: bool,
    within_s: float | None = None,
) -> str:  # fmt: skip
    """One row of the table."""
    within_s = within_s or (FAULTS | HANGS)[kind].within_s
    drawn = "-" if (FAULTS | HANGS)[kind].sent else str(guilty)
    shown = re.sub(r" on [^:, ]+", "", first.replace(f"{Path.cwd()}/", ""))
    shown = shown.removeprefix("hybrid: ")[:110].replace("|", "/")
    return (
        f"| {strategy} | {kind} | {drawn} | {exits} | {took:.1f} of {within_s:.0f} | {shown} "
        f"| {left or 'nothing'} | {'yes' if ok else '**no**'} |"
    )


def check(strategy: str, kind: str, folder: Path) -> tuple[bool, str]:
    """Whether one run ended as promised, and its row."""
    fault = (FAULTS | HANGS)[kind]
    guilty = 0 if kind == "a taken port" else draw_guilty(kind, strategy)
    out = folder / f"{strategy}-{kind}".replace(" ", "-")
    meets = fault.plant in ("never_starts", "goes_elsewhere", "port_is_taken")
    run = start(out, strategy, fault, guilty, waits=meets)
    began = wait_for_fault(out, run, steps=2 if fault.sent else 0)
    if fault.sent:
        run.send_signal(fault.sent)
    try:
        _, said = run.communicate(timeout=5 * LIMIT_S + START_S)
    except subprocess.TimeoutExpired:
        run.kill()
        run.communicate()
        return False, row_of(strategy, kind, guilty, "did not end", 999, "", "", False)
    took, left = time.time() - began, leftovers(out)
    lines = [line for line in said.splitlines() if re.match("hybrid: (?!warning)", line)]
    first = lines[0] if lines else ""
    ok = run.returncode == fault.status and took <= fault.within_s and not left
    ok = ok and bool(re.search(fault.words.replace("N", str(guilty)), first))
    return ok, row_of(strategy, kind, guilty, str(run.returncode), took, first, left, ok)


def check_cut(strategy: str, kind: str, folder: Path) -> tuple[bool, str]:
    """Whether all ranks of a run end when one host's link is cut, and the row.

    The others must name the rank there. It cannot know that it is the one that is cut off."""
    fault, guilty, out = FAULTS[kind], draw_guilty(kind, strategy), folder / f"{strategy}-cut"
    limits = {"start_timeout_s": 120, "setup_timeout_s": 120, "collective_timeout_s": LIMIT_S}
    records.write(to_dict(small_job(train__steps=100_000, launch=limits)), out / "small.json")
    words = ["train", str(out / "small.json"), "--strategy", strategy, "--out", str(out)]
    with Hosts(NPROC) as hosts:
        ranks = hosts.start_ranks(range(NPROC), words, out)
        # Some seconds of steps, after which each rank's last sign of life says so.
        wait_for_fault(out, None, steps=100)
        time.sleep(2)
        began = time.time()
        hosts.cut(guilty)
        try:
            codes = [rank.wait(timeout=120) for rank in ranks]
        except subprocess.TimeoutExpired:
            return False, row_of(strategy, kind, guilty, "did not end", 999, "", "", False)
    took, left = time.time() - began, leftovers(out)
    firsts = first_lines(out, guilty)
    words_ = fault.words.replace("N", str(guilty))
    # Rank 0's host is that of the store, with which all is out of sight.
    words_ = words_.replace("in step", "meeting point|in step") if guilty == 0 else words_
    wrong = [first for first in firsts if not re.search(words_, first)]
    ok = codes == [1] * NPROC and took <= fault.within_s and not left and not wrong
    exits = ", ".join(map(str, codes))
    return ok, row_of(strategy, kind, guilty, exits, took, (wrong or firsts)[0], left, ok)


def runs_of(faults: Mapping[str, Fault]) -> list[Callable[[Path], tuple[bool, str]]]:
    """All runs of a table, each given the folder to run in."""
    found: list[Callable[[Path], tuple[bool, str]]] = []
    for kind in faults:
        if kind == CUT and (reason := why_not()):
            print(f"faults: no link was cut: {reason}", file=sys.stderr)
            continue
        does = check_cut if kind == CUT else check
        found += [functools.partial(does, strategy, kind) for strategy in STRATEGIES]
    return found


def main() -> None:
    """All faults, then one clean run of each strategy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hangs", action="store_true", help="the places in which a rank hangs")
    parser.add_argument("--only", default="", help="STRATEGY,KIND: this row alone; may be part")
    asked = parser.parse_args()
    faults = HANGS if asked.hangs else FAULTS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no host is left
    print(f"# {'Where a rank hangs' if asked.hangs else 'How runs end'}\n")
    command = " ".join(["python -m benchmarks.faults", *sys.argv[1:]])
    print(
        f"{NPROC} processes, gloo, timeouts of {LIMIT_S} s in the job; seed {SEED} draws the guilty"
        f" rank. {summarise_machine()}.\nCommand: `{command}`. Seconds: from the fault to the "
        "command's end, with what is promised.\nLeft behind: processes and locks that are there 5 "
        "s later.\n"
    )
    print("| strategy | fault | rank | exit | seconds | first line | left behind | as promised |")
    print("|---|---|---|---|---|---|---|---|")
    strategy, _, kind = asked.only.partition(",")
    good, count = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for run in runs_of(faults):
            if not (run.args[0].startswith(strategy) and run.args[1].startswith(kind)):  # type: ignore[attr-defined]
                continue
            ok, row = run(Path(folder))
            print(row, flush=True)
            good, count = good + ok, count + 1
        print(f"\n{good} of {count} as promised. Then, each once more without a fault:\n")
        for strategy in () if asked.only else STRATEGIES:
            clean = start(Path(folder) / f"clean-{strategy}", strategy, NO_FAULT, 0)
            clean.communicate(timeout=300)
            print(f"- {strategy}: exit {clean.returncode}", flush=True)


if __name__ == "__main__":
    main()
