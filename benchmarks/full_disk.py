"""Fills the disk at drawn moments of commands, and looks at how they end and what stays.

    python -m benchmarks.full_disk --out DIR [--only NAME,NAME]

Run from the top folder of the checkout, as root: each case mounts a tmpfs of 24 MiB on DIR/disk. A
function of `hybrid` is wrapped, in the command or in one of its ranks, so that the disk is full
when it is called. The command has to end with status 3 (2 where `cache` has no room for tokens) and
one line, which names the folder, the system's words and the file; no file may be half written, and
no part of one may stay. When there is room again, the same command has to end well, with
`--resume auto` where it trains. DIR/full_disk.md has a row for each case."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .kill_traces import half_files, left_in, owners
from .machine import summarise_machine

BALLAST = "ballast"
GPT = {"num_layers": 1, "width": 24, "num_heads": 3, "context": 16}
JOB: dict[str, Any] = {
    "model": {"name": "gpt", "options": GPT | {"vocab_size": 257}},
    "data": {"name": "text", "options": {"context": 16}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 6, "micro_batches": 1, "steps": 4},
    "checkpoint": {"every": 2},
}  # fmt: skip


class Moment(NamedTuple):
    """Is a call by which the disk is full.

    function: whose `nth` call it is. rank: in which process, None: in the command. names: what the
    line has to name. command: `train`, `compare` or `export`. disk: which folder is on the disk."""

    function: str
    rank: int | None
    names: str
    command: str = "train"
    nth: int = 0
    disk: str = "run"
    status: int = 3

    def more(self) -> list[str]:
        """Return by which words a run goes on that has saved its state."""
        return ["--resume", "auto"] if self.command != "export" else []


MOMENTS = {
    "job": Moment("hybrid.training.folder:records.write", None, "(record.json)"),
    # Rank 0 may write its record in the same moment, and finds the disk full before rank 1 does.
    "log": Moment(
        "hybrid.launch.failures:RankStatus.__init__", 1, "(logs/rank1.where)|(record.json)"
    ),
    "steps": Moment("hybrid.training.step_log:StepLog.write", 0, "(steps.jsonl)"),
    "checkpoint": Moment("hybrid.training.checkpointing:Checkpoints.save", 1, "checkpoints", nth=1),
    "weights": Moment("hybrid.training.in_progress:RunInProgress._save", 0, "final"),
    "record": Moment("hybrid.training.trackers:Trackers.finish", 0, "(record.json)"),
    "session": Moment("hybrid.comparison.session:begin_session", None, "(session.json)", "compare"),
    "markdown": Moment("hybrid.report.files:write_whole", None, "(compare.md)", "compare"),
    "page": Moment("hybrid.report.files:write_whole", None, "(report.html)", "compare", 1),
    "result": Moment("hybrid.report.files:write_whole", None, "(compare.json)", "compare", 2),
    "temporary": Moment("hybrid.models.shared:naming", 0, "tensors of the model", disk="tmp"),
    "tokens": Moment("hybrid.data.text.cache:whole_file", None, ".tokens", disk="cache", status=2),
    "export": Moment(
        "hybrid.training.export_formats:write_weights", None, "(it)", "export", disk="to"
    ),
}  # fmt: skip


def fill(disk: Path) -> None:
    """Fill a file system to its last byte."""
    with contextlib.suppress(OSError), (disk / BALLAST).open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def plant(moment: Moment, disk: Path) -> None:
    """Have this process fill the disk before a call of the moment's function."""
    module, _, dotted = moment.function.partition(":")
    *above, name = dotted.split(".")
    holder = pkgutil.resolve_name(":".join([module, ".".join(above)]) if above else module)
    call, calls = getattr(holder, name), iter(range(sys.maxsize))

    @functools.wraps(call)
    def planted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == moment.nth:
            fill(disk)
        return call(*arguments, **options)

    setattr(holder, name, planted)


def run_planted(name: str, disk: Path, words: list[str]) -> None:
    """Run a command of `hybrid` with a moment planted in this process or in the ranks."""
    from hybrid import cli
    from hybrid.training import run

    moment, rank = MOMENTS[name], os.environ.get("RANK")
    if rank == (None if moment.rank is None else str(moment.rank)):
        plant(moment, disk)
    run.PROGRAM = (sys.executable, "-m", "benchmarks.full_disk", name, str(disk))
    sys.argv = ["hybrid", *words]
    cli.main()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a tmpfs while the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    subprocess.run(words, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Let the disk be full at one moment, and return what is wrong then and afterwards."""
    moment, out = MOMENTS[name], folder / name
    out.mkdir(parents=True)
    (out / "text.txt").write_text("the cat sat on the mat and then it slept\n" * 200)
    with small_disk(out / "disk") as disk:
        places = {kind: out / kind for kind in ("run", "tmp", "cache", "to")}
        places[moment.disk] = disk / moment.disk
        for kind in ("tmp", "cache", "to"):
            places[kind].mkdir(exist_ok=True)
        options = JOB["data"]["options"] | {"path": str(out / "text.txt")}
        data = {"data": {"name": "text", "options": options | {"cache": str(places["cache"])}}}
        (out / "job.json").write_text(json.dumps(JOB | data))
        words = command_of(moment, out, places)
        environment = os.environ | {"TMPDIR": str(places["tmp"])}
        run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment)
        if moment.command == "export":  # of a run that has ended well
            run([sys.executable, "-m", "hybrid", *command_of(Moment("", 0, ""), out, places)])
        done = run([sys.executable, "-m", "benchmarks.full_disk", name, str(disk), *words])
        problems = how_it_ended(done, places[moment.disk], moment)
        problems += half_files(places["run"]) + left_in(places["run"])
        problems += [f"left: {x.name}" for p in places.values() for x in p.rglob("*.part")]
        problems += [f"left in the temporary folder: {x}" for x in owners(places["tmp"])]
        if not (disk / BALLAST).exists():
            problems.append("the moment was not reached")
        (disk / BALLAST).unlink(missing_ok=True)
        again = run([sys.executable, "-m", "hybrid", *words, *moment.more()])
        if again.returncode:
            problems.append(f"with room again: {again.returncode}, {again.stderr[-300:]}")
    said = [line for line in done.stderr.splitlines() if line.startswith("hybrid: ")]
    return {"name": name, "said": "; ".join(said).replace(str(out), ""), "problems": problems}


def command_of(moment: Moment, out: Path, places: dict[str, Path]) -> list[str]:
    """Return the words of a moment's command."""
    job, run = str(out / "job.json"), str(places["run"])
    if moment.command == "export":
        return ["export", run, "--to", str(places["to"] / "it")]
    if moment.command == "compare":
        return ["compare", job, "--strategies", "ddp", "--nproc", "2", "--out", run]
    return ["train", job, "--strategy", "ddp", "--nproc", "2", "--out", run]


def how_it_ended(done: Any, folder: Path, moment: Moment) -> list[str]:
    """Return what is wrong with the end of a command."""
    said = [x for x in done.stderr.splitlines() if x.startswith("hybrid: ") and "warning" not in x]
    line, problems = (said or [""])[-1], list[str]()
    if done.returncode != moment.status:
        problems.append(f"left with {done.returncode}")
    if len(said) != 1 or "Traceback" in done.stderr:
        problems.append(f"said more than a line: {done.stderr[-600:]}")
    for part in (str(folder), "No space left on device", moment.names):
        if not any(text in line for text in part.split("|")):
            problems.append(f"does not say {part!r}: {line}")
    return problems


def main() -> int:
    """Run the cases, and write what each one said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(MOMENTS))
    given = parser.parse_args()
    rows = [run_case(name, given.out.absolute()) for name in given.only.split(",")]
    lines = ["# A full disk", "", f"Machine: {summarise_machine()}.", ""]
    lines += ["Command: `python -m benchmarks.full_disk --out DIR`.", ""]
    lines += ["| moment | what the command said | wrong |", "|---|---|---|"]
    lines += [f"| {r['name']} | {r['said']} | {'; '.join(r['problems']) or '-'} |" for r in rows]
    (given.out / "full_disk.md").write_text("\n".join(lines) + "\n")
    for row in rows:
        print(f"{row['name']}: {row['problems'] or 'well'}", file=sys.stderr)
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] in MOMENTS:
        run_planted(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    else:
        raise SystemExit(main())
