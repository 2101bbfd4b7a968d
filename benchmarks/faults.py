"""How runs end whatever befalls a rank: twelve kinds of fault under five strategies, as a table.

    python -m benchmarks.faults > benchmarks/faults.md

Run from the top folder; about fifteen minutes on two cores. Each run must end within its stated
time, with the expected status and first cause, and leave no process and no lock. After all of them
each strategy trains once more. The link is cut between two hosts that benchmarks/hosts.py makes,
which needs root; there each rank ends by itself.
"""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from hybrid import records
from hybrid.job.file import to_dict
from hybrid.launch.ops_cache import ops_folder
from tests.conftest import small_job
from tests.test_failures import ranks_of, start_train

from .hosts import Hosts, why_not
from .machine import summarise_machine

STRATEGIES = ("ddp", "fsdp", "zero2", "zero3", "pipeline")
LIMIT_S = 6  # launch.start_timeout_s and launch.collective_timeout_s of the runs
START_S = 15  # from the command to the fault at most, on two cores


class Fault(NamedTuple):
    """What is planted (tests/failing.py) or sent; how the command must end, within how long of
    the fault, and what its first line about it must say."""

    plant: str
    sent: int | None
    status: int
    within_s: float
    words: str


STEP = r"\(in step 2\)"
FAULTS = {
    "a rank raises": Fault("raises", None, 1, 5, rf"rank 1 .*the sky fell {STEP}"),
    "a rank is killed": Fault("is_killed", None, 1, 5, rf"rank 1 .*SIGKILL.*{STEP}"),
    "out of memory": Fault("has_no_memory", None, 1, 5, "rank 1 .*out of memory in step 2"),
    "a rank is stopped": Fault(
        "is_stopped", None, 1, LIMIT_S + 12, rf"rank 1 .*no sign of life.*{STEP}"
    ),
    "a rank falls behind": Fault(
        "falls_behind", None, 1, LIMIT_S + 12, rf"rank 1 .*did not join the others.*{STEP}"
    ),
    "a rank never starts": Fault("never_starts", None, 1, LIMIT_S + 12, "ranks 1 of 2 did not st"),
    "a wrong rendezvous": Fault("goes_elsewhere", None, 1, LIMIT_S + 12, "rank 1 .*no meeting of"),
    "a taken port": Fault("port_is_taken", None, 1, LIMIT_S + 12, "rank 0 .*cannot listen on"),
    "SIGTERM": Fault("nothing", signal.SIGTERM, 143, 5, ""),
    "Ctrl-C": Fault("nothing", signal.SIGINT, 130, 5, "hybrid: interrupted"),
    "the launcher is killed": Fault("nothing", signal.SIGKILL, -9, 5, ""),
}

NO_FAULT = Fault("nothing", None, 0, 0, "")


def start(out: Path, strategy: str, fault: Fault) -> subprocess.Popen[str]:
    """The run with its fault, in the background."""
    limits = {"start_timeout_s": LIMIT_S, "collective_timeout_s": LIMIT_S}
    steps = 6 if fault.sent is None else 100_000
    return start_train(out, strategy, steps, fault=fault.plant, launch=limits)


def wait_for_fault(out: Path, fault: Fault, steps: int = 2) -> float:
    """When the fault came: with the second step's record, or when the ranks began to meet."""
    deadline = time.monotonic() + 2 * START_S
    file = out / ("steps.jsonl" if fault.words.endswith(STEP) or fault.sent else "logs/rank0.where")
    lines = steps if file.suffix == ".jsonl" else 0
    while time.monotonic() < deadline:
        if file.exists() and len(file.read_text().splitlines()) >= lines:
            break
        time.sleep(0.05)
    return time.monotonic()


def leftovers(out: Path) -> str:
    """Processes and locks of a run that are still there, after a moment to end."""
    deadline = time.monotonic() + 5
    while (left := ranks_of(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return "; ".join([*left, *(str(path) for path in ops_folder().glob("**/lock"))])


def check(strategy: str, name: str, folder: Path) -> tuple[bool, str]:
    """Whether one run ended as promised, and its row."""
    fault, out = FAULTS[name], folder / f"{strategy}-{name}".replace(" ", "-")
    run = start(out, strategy, fault)
    began = wait_for_fault(out, fault)
    if fault.sent:
        run.send_signal(fault.sent)
    try:
        _, said = run.communicate(timeout=3 * LIMIT_S + START_S)
    except subprocess.TimeoutExpired:
        run.kill()
        run.communicate()
        return False, f"| {strategy} | {name} | did not end | | | | **no** |"
    took, left = time.monotonic() - began, leftovers(out)
    lines = [line for line in said.splitlines() if re.match("hybrid: (?!warning)", line)]
    first = lines[0] if lines else ""
    ok = run.returncode == fault.status and took <= fault.within_s and not left
    ok = ok and bool(re.search(fault.words, first))
    shown = re.sub(r" on \S+:", ":", first.replace(f"{Path.cwd()}/", ""))
    shown = shown.removeprefix("hybrid: ")[:90].replace("|", "/")
    return ok, (
        f"| {strategy} | {name} | {run.returncode} | {took:.1f} of {fault.within_s:.0f} | {shown} "
        f"| {left or 'nothing'} | {'yes' if ok else '**no**'} |"
    )


def check_cut(strategy: str, folder: Path) -> tuple[bool, str]:
    """Whether both ranks of a run end when the link between their hosts is cut, and the row."""
    out, within_s = folder / f"{strategy}-cut", 2 * LIMIT_S + 12
    limits = {"start_timeout_s": 60, "collective_timeout_s": LIMIT_S}
    records.write(to_dict(small_job(train__steps=100_000, launch=limits)), out / "small.json")
    words = ["train", str(out / "small.json"), "--strategy", strategy, "--out", str(out)]
    with Hosts(2) as hosts:
        ranks = hosts.start_ranks([0, 1], words, out)
        # Some seconds of steps, after which each rank's last sign of life says so.
        began = wait_for_fault(out, FAULTS["SIGTERM"], steps=200)
        hosts.cut(1)
        try:
            codes = [rank.wait(timeout=120) for rank in ranks]
        except subprocess.TimeoutExpired:
            return False, f"| {strategy} | a cut link | did not end | | | | **no** |"
    took, left = time.monotonic() - began, leftovers(out)
    said = (out / "rank0.log").read_text().splitlines()
    first = next((line for line in said if line.startswith("hybrid: rank")), "")
    ok = codes == [1, 1] and took <= within_s and not left
    ok = ok and bool(re.search("because of rank 1 .*no sign of life.*in step", first))
    shown = re.sub(r" on [^:,]+", "", first).removeprefix("hybrid: ")[:90]
    return ok, (
        f"| {strategy} | a cut link | {codes[0]}, {codes[1]} | {took:.1f} of {within_s} | {shown} "
        f"| {left or 'nothing'} | {'yes' if ok else '**no**'} |"
    )


def main() -> None:
    """All faults, then one clean run of each strategy."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no host is left
    print("# How runs end\n")
    print(
        f"Two processes, gloo, timeouts of {LIMIT_S} s in the job. {summarise_machine()}.\n"
        "Command: `python -m benchmarks.faults`. Seconds: from the fault to the command's end, "
        "with what is promised.\nLeft behind: processes and locks that are there 5 s later.\n"
    )
    print("| strategy | fault | exit | seconds | first line | left behind | as promised |")
    print("|---|---|---|---|---|---|---|")
    good, count = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        runs = [functools.partial(check, s, name) for name in FAULTS for s in STRATEGIES]
        if reason := why_not():
            print(f"faults: no link was cut: {reason}", file=sys.stderr)
        else:
            runs += [functools.partial(check_cut, strategy) for strategy in STRATEGIES]
        for run in runs:
            ok, row = run(Path(folder))
            print(row, flush=True)
            good, count = good + ok, count + 1
        print(f"\n{good} of {count} as promised. Then, each once more without a fault:\n")
        for strategy in STRATEGIES:
            clean = start(Path(folder) / f"clean-{strategy}", strategy, NO_FAULT)
            clean.communicate(timeout=120)
            print(f"- {strategy}: exit {clean.returncode}")


if __name__ == "__main__":
    main()
