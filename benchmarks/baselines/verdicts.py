"""Says what the figures of `benchmarks.overhead` show, and which of its promises hold.

A session is one strategy on one workload, as `worker` leaves it. A figure is void where the A/A row
(the hand-written loop twice) says so. The module needs no torch.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

Session = dict[str, Any]
TIMED = ("engine", "loop")  # whose cost is judged: of a step between two that are logged
SMALL_EXCHANGE = 1024  # bytes of a collective that carries numbers, not tensors
MORE_OPERATIONS = 1.05  # of aten on the GPT
MORE_CPU_US = {"single": 100.0}  # on the trivial model
MORE_CPU_US_ELSE = 250.0
MNIST_RATIO = 1.05
YES, NO, VOID = "yes", "no", "void"


@dataclasses.dataclass(frozen=True)
class Spread:
    """Holds the median of some figures with their 10 % and 90 % quantiles."""

    low: float
    median: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __format__(self, form: str) -> str:
        low, median, high = (format(v, form) for v in (self.low, self.median, self.high))
        return f"{median} [{low}, {high}]"

    @property
    def width(self) -> float:
        """Return the distance between the quantiles."""
        return self.high - self.low


def spread(values: list[float]) -> Spread:
    """Return the median and the quantiles; between two values they lie on a line."""
    ordered = sorted(values)

    def at(part: float) -> float:
        place = part * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

    return Spread(at(0.1), at(0.5), at(0.9))


def ratio(session: Session, name: str, base: str, key: str = "cpu_us") -> Spread:
    """Return a row's cost divided by its base's, block by block."""
    rows = session["rows"]
    pairs = zip(rows[name][key], rows[base][key], strict=True)
    return spread([mine / theirs for mine, theirs in pairs])


def over(session: Session, name: str, base: str) -> Spread:
    """Return a row's CPU time in microseconds above its base's, block by block."""
    rows = session["rows"]
    pairs = zip(rows[name]["cpu_us"], rows[base]["cpu_us"], strict=True)
    return spread([mine - theirs for mine, theirs in pairs])


def ran(session: Session, name: str) -> bool:
    """Tell whether a row, and the row that it is held against, were measured."""
    rows = session.get("rows", {})
    if name not in rows or rows[name]["status"] != "ok":
        return False
    others = (rows[rows[name]["base"]], rows[rows[name]["plain"]])
    return all(row["status"] == "ok" for row in others) and bool(rows[name].get("cpu_us"))


def judge_ratio(found: Spread, same: Spread) -> str:
    """Say what a ratio is worth beside the A/A row's: "", "equal" or why it is void.

    It is void where the A/A row's interval does not contain 1, or is wider than the difference that
    is claimed; it claims none where it lies inside that interval."""
    if 1.0 not in same:
        return f"{VOID}: A/A {same:.3f}"
    if found.median in same:
        return "equal"
    if same.width > abs(found.median - 1):
        return f"{VOID}: A/A {same:.3f}, wider"
    return ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """Holds whether a promise holds for one row of a session: yes, no or void, and the figure."""

    promise: str
    strategy: str
    workload: str
    row: str
    result: str
    figure: str


def claims(sessions: list[Session]) -> list[Claim]:
    """Judge every promise on every session that was measured."""
    found = []
    for session in sessions:
        for name, row in session.get("rows", {}).items():
            if row["kind"] == "hybrid" and ran(session, name):
                where = session["strategy"], session["workload"], name
                judged = [*_judge_counts(session, name)]
                judged += _judge_cost(session, name) if name in TIMED else []
                found += [Claim(promise, *where, *rest) for promise, *rest in judged]
    return found


def _judge_counts(session: Session, name: str) -> Iterator[tuple[str, str, str]]:
    row = session["rows"][name]
    mine, theirs = row["counts"], session["rows"][row["plain"]]["counts"]
    yield ("the same collectives and one small exchange", *_judge_collectives(mine, theirs))
    most = 1 if row["reads"] else 0
    yield ("at most one host read a step, none unlogged", *_judge_reads(mine, theirs, most))
    if session["workload"] == "gpt":
        more = max(a["aten"] / b["aten"] for a, b in zip(mine, theirs, strict=True))
        result = YES if more <= MORE_OPERATIONS else NO
        yield ("at most 5 % more operations on the GPT", result, f"{more:.3f}")


def _judge_cost(session: Session, name: str) -> Iterator[tuple[str, str, str]]:
    base = session["rows"][name]["base"]
    if session["workload"] == "gpt":
        yield ("1.00 on the GPT", *_judge_equal(session, name, base))
    if session["workload"] == "trivial":
        yield ("CPU over the hand-written loop", *_judge_microseconds(session, name, base))
    if session["workload"] == "mnist":
        yield ("at most 1.05 on MNIST", *_judge_limit(session, name, base))
        for peer in _peers(session):
            yield (f"at or below {peer} on MNIST", *_judge_peer(session, name, peer))


def _peers(session: Session) -> list[str]:
    """List the peers that were measured; of one with a row that logs as hybrid does, that row."""
    peers = [n for n, row in session["rows"].items() if row["kind"] == "peer" and ran(session, n)]
    return [name for name in peers if f"{name}_logs" not in peers]


def _judge_collectives(mine: list[Any], theirs: list[Any]) -> tuple[str, str]:
    """Compare each rank's calls and bytes of a step."""
    calls = max(a["calls"] - b["calls"] for a, b in zip(mine, theirs, strict=True))
    size = max(a["bytes"] - b["bytes"] for a, b in zip(mine, theirs, strict=True))
    fewer = min(a["bytes"] - b["bytes"] for a, b in zip(mine, theirs, strict=True))
    holds = calls <= 1 and size <= SMALL_EXCHANGE
    figure = f"{calls:+g} calls, {size:+,.0f} B"
    return YES if holds else NO, figure + (f" ({fewer:+,.0f} B)" if fewer < 0 else "")


def _judge_reads(mine: list[Any], theirs: list[Any], most: int) -> tuple[str, str]:
    """Compare host reads of a step; DeepSpeed has some of its own."""
    more = max(a["host_reads"] - b["host_reads"] for a, b in zip(mine, theirs, strict=True))
    return YES if more <= most else NO, f"{more:+g}, at most {most}"


def _judge_equal(session: Session, name: str, base: str) -> tuple[str, str]:
    found, same = ratio(session, name, base), ratio(session, "raw_again", "raw")
    figure = f"{found:.3f}, A/A {same:.3f}"
    if 1.0 not in same:
        return VOID, figure
    return YES if found.median in same or found.median < 1 else NO, figure


def _judge_limit(session: Session, name: str, base: str) -> tuple[str, str]:
    found, same = ratio(session, name, base), ratio(session, "raw_again", "raw")
    figure = f"{found:.3f}, A/A {same:.3f}"
    if 1.0 not in same or same.width > MNIST_RATIO - 1:
        return VOID, figure
    return YES if found.median <= MNIST_RATIO else NO, figure


def _judge_microseconds(session: Session, name: str, base: str) -> tuple[str, str]:
    most = MORE_CPU_US.get(session["strategy"], MORE_CPU_US_ELSE)
    found, same = over(session, name, base), over(session, "raw_again", "raw")
    figure = f"{found:.0f} us, at most {most:g}, A/A {same:.0f}"
    if 0.0 not in same or same.width > most:
        return VOID, figure
    return YES if found.median <= most else NO, figure


def _judge_peer(session: Session, name: str, peer: str) -> tuple[str, str]:
    rows = session["rows"]
    mine = ratio(session, name, rows[name]["base"])
    other = ratio(session, peer, rows[peer]["base"])
    same = ratio(session, "raw_again", "raw")
    figure = f"{mine.median:.3f}, {peer} {other.median:.3f}"
    if 1.0 not in same:
        return VOID, figure
    if mine.median > other.median and mine.median / other.median in same:
        return YES, figure + ", equal within A/A"
    return YES if mine.median <= other.median else NO, figure
