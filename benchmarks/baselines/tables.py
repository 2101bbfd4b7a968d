"""Writes what `benchmarks.overhead` found as Markdown."""

from collections.abc import Iterable
from typing import Any

from .verdicts import Session, claims, judge_ratio, over, ran, ratio, spread

LOOPS = {  # what each row is
    "raw": "the hand-written loop (`benchmarks/baselines/`), on micro-batches made once",
    "raw_again": "the same once more in the same process: the A/A row",
    "raw_reads": "it also reads its loss and takes its gradient norm, in every step",
    "raw_loads": "it loads its micro-batches by indexing the tensors in every step",
    "raw_dataloader": "it loads its micro-batches by torch's DataLoader in every step",
    "engine": "`hybrid.open_engine` on micro-batches made once, `log.every = 10`",
    "engine_reads": "the same, and it waits for each step's loss and norm, `log.every = 1`",
    "loop": "`hybrid.train`: data, status file, `steps.jsonl`, progress; `log.every = 10`",
    "loop_reads": "the same with `log.every = 1`, the default",
    "accelerate": "Accelerate's loop, on micro-batches made once",
    "accelerate_logs": "the same; once in ten steps it reads its loss and takes its gradient norm",
    "fabric": "Lightning Fabric's loop, on micro-batches made once",
    "fabric_logs": "the same; once in ten steps it reads its loss and takes its gradient norm",
    "trainer": "transformers' Trainer, by torch's DataLoader in every step",
    "torch_pipelining": "`torch.distributed.pipelining`, 1F1B, on micro-batches made once",
    "torch_pipelining_logs": "the same; once in ten steps it reads its loss and takes its norm",
}


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], words: int = 1) -> str:
    """Write a table whose first `words` columns are words and whose others are figures."""
    names = list(head)
    marks = ["---"] * words + ["---:"] * (len(names) - words)
    lines = [names, marks, *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(found: dict[str, Any]) -> str:
    """Write the whole page."""
    sessions = [s for s in found["sessions"] if "rows" in s]
    parts = [
        "# What hybrid costs over hand-written loops",
        found["about"],
        f"Command: `{found['command']}`",
        _how(found),
        "## What was promised",
        _promises(sessions),
        *_refused(found["sessions"]),
        "## Rows",
        table(["row", "what it is"], LOOPS.items(), 2),
        "## Calls of a step",
        _counts(sessions),
        "## Operations that the hand-written loop has not",
        _operations(sessions),
        "## CPU time of a step",
        _costs(sessions),
        "## Not measured",
        table(["row", "why", "where"], _missing(sessions), 3),
    ]
    return "\n\n".join(parts) + "\n"


def _how(found: dict[str, Any]) -> str:
    rounds = sorted({s["rounds"] for s in found["sessions"] if "rounds" in s}) or [0]
    turns = f"{rounds[0]} to {rounds[-1]} times" if rounds[1:] else f"{rounds[0]} times"
    return (
        "CPU time is that of a rank with all its threads, the mean over ranks; wall time is the "
        "slowest rank's. Rows take turns in one process a rank, "
        f"{turns} in each of {found['blocks']} blocks; figures are medians over blocks with 10 % "
        "and 90 % quantiles in brackets. A ratio is formed block by block with the row's base. A "
        "figure is void where the A/A row's interval does not contain 1 or is wider than the "
        "difference; `equal` is a ratio inside it. Losses of the first five steps are those of the "
        "base to 1e-6, or the row is refused. Calls were "
        "counted twice and agree, unless a star says otherwise. That an exchange is asynchronous "
        f"is not seen here.{_slices(found['sessions'])}{_untimed(found['sessions'])}"
    )


def _slices(sessions: list[Session]) -> str:
    """Name the sessions whose ranks had the time slices of hybrid's own ranks."""
    words = (
        "every row, the hand-written loop too, runs in the short time slices that hybrid gives its "
        "ranks (`hybrid/launch/threads.py`)."
    )
    return _under(sessions, "short_time_slices", words)


def _untimed(sessions: list[Session]) -> str:
    """Name the sessions whose turns begin with steps that are not timed, as all do now."""
    steps = max((s.get("untimed_steps", 0) for s in sessions), default=0)
    words = f"the first steps of a turn, {steps} at most, are not timed."
    return _under(sessions, "untimed_steps", words)


def _under(sessions: list[Session], key: str, words: str) -> str:
    """Say something of the sessions of which a key is true; nothing where there is none."""
    names = [s["strategy"] for s in sessions if s.get(key)]
    return f" Under {', '.join(names)} {words}" if names else ""


def _promises(sessions: list[Session]) -> str:
    judged = claims(sessions)
    rows = [(c.promise, c.strategy, c.workload, c.row, c.result, c.figure) for c in judged]
    head = ["promise", "strategy", "workload", "row", "holds", "figure"]
    bad = sum(c.result != "yes" for c in judged)
    return f"{len(judged) - bad} of {len(judged)} hold.\n\n" + table(head, sorted(rows), 6)


def _refused(sessions: list[Session]) -> list[str]:
    """List what makes the script exit with 1."""
    lines = []
    for session in sessions:
        where = f"{session['strategy']} {session['workload']}"
        if "rows" not in session:
            lines.append(f"- {where}: {session['reason']}")
        for name, row in session.get("rows", {}).items():
            if row["status"] in ("refused", "failed"):
                lines.append(f"- {where} {name} {row['status']}: {row['reason']}")
    return ["## Refused or failed", "\n".join(lines)] if lines else []


def _each(sessions: list[Session]) -> Iterable[tuple[Session, str, dict[str, Any]]]:
    for session in sessions:
        for name, row in session["rows"].items():
            if ran(session, name):
                yield session, name, row


def _ranks(values: Iterable[float], form: str) -> str:
    """Write one figure where all ranks agree, else one a rank."""
    texts = [format(value, form) for value in values]
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def _counts(sessions: list[Session]) -> str:
    rows = []
    for session, name, row in _each(sessions):
        counts = row["counts"]
        star = "" if all(count["same"] for count in counts) else " *"
        rows.append(
            (
                session["strategy"],
                session["workload"],
                name + star,
                _ranks((c["aten"] for c in counts), "g"),
                _ranks((c["host_reads"] for c in counts), "g"),
                _ranks((c["lists"] for c in counts), "g"),
                _ranks((c["calls"] for c in counts), "g"),
                _ranks((c["bytes"] for c in counts), ",.0f"),
                f"{row['difference']:.0e}",
            )
        )
    head = ["strategy", "workload", "row", "aten operations", "host reads", "read as lists"]
    return table([*head, "collectives", "bytes", "losses apart"], rows, 3)


def _operations(sessions: list[Session]) -> str:
    """List by name what hybrid's rows call more or less often than their base, on the last rank."""
    rows = []
    for session, name, row in _each(sessions):
        if row["kind"] != "hybrid":
            continue
        mine = row["counts"][-1]["by_name"]
        base = session["rows"][row["plain"]]["counts"][-1]["by_name"]
        more = {key: mine.get(key, 0) - base.get(key, 0) for key in {*mine, *base}}
        listed = sorted((-count, key) for key, count in more.items() if count)
        words = ", ".join(f"{key} {-count:+g}" for count, key in listed)
        rows.append((session["strategy"], session["workload"], name, words or "none"))
    return table(["strategy", "workload", "row", "on the last rank"], rows, 4)


def _costs(sessions: list[Session]) -> str:
    rows = []
    for session, name, row in _each(sessions):
        base = "raw" if row["kind"] == "raw" else row["base"]
        found = ratio(session, name, base)
        plain = name in ("raw", "raw_again")
        cells = ["-"] * 3
        if name != "raw":
            wall = ratio(session, name, base, "wall_us")
            cells = [f"{over(session, name, base):.0f}", f"{found:.3f}", f"{wall:.3f}"]
        rows.append(
            (
                session["strategy"],
                session["workload"],
                name,
                base,
                f"{spread(row['cpu_us']):.0f}",
                *cells,
                "" if plain else judge_ratio(found, ratio(session, "raw_again", "raw")),
            )
        )
    head = ["strategy", "workload", "row", "base", "CPU us", "over base us", "CPU ratio"]
    return table([*head, "wall ratio", "of the CPU ratio"], rows, 4)


def _missing(sessions: list[Session]) -> Iterable[tuple[str, ...]]:
    where: dict[tuple[str, str], list[str]] = {}
    for session in sessions:
        for name, row in session["rows"].items():
            if row["status"] == "skipped":
                place = f"{session['strategy']} {session['workload']}"
                where.setdefault((name, row["reason"]), []).append(place)
    return [(*key, ", ".join(places)) for key, places in where.items()]
