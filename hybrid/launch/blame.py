"""This module finds, by what all ranks say of themselves, the one that the others wait for.

It decides by facts alone: whether a rank says that it waits, its step, how many collectives it has
begun, whether it has ended. It asks no other process."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

STARTING = "starting"


@dataclasses.dataclass(frozen=True)
class Sign:
    """Holds what a rank last said of itself.

    beat: the number of this sign. where: what it does, in words. line: FILE:LINE that its main
    thread executes. waits: for what of the others, empty: it does not. step: in which it is, -1: in
    none. begun: collectives. left: how it has left, empty: it has not."""

    beat: int = 0
    host: str = "its host"
    where: str = STARTING
    line: str = ""
    waits: str = ""
    step: int = -1
    begun: int = 0
    left: str = ""


ENDED, FAILED = "ended", "failed"  # how a rank leaves


@dataclasses.dataclass(frozen=True)
class Cause:
    """Says which rank failed first by what this rank knows, why, and what it was doing.

    `line` says where in the user's code, if it was there: ", at FILE:LINE (log: ...)"."""

    rank: int
    host: str
    message: str
    where: str
    line: str = ""

    def describe(self) -> str:
        """Describe the failure in one line."""
        return f"rank {self.rank} on {self.host}: {self.message} ({self.where}){self.line}"


def find_cause(before: Sequence[Sign], now: Sequence[Sign], here: int) -> Cause | None:
    """Return the failure for which this rank waits, by what all ranks said at two moments."""
    found = silent_rank(before, now, here) or stuck_rank(now, here)
    if found is None:
        return None
    rank, message = found
    return Cause(rank, now[rank].host, message, now[rank].where)


def silent_rank(before: Sequence[Sign], now: Sequence[Sign], here: int) -> tuple[int, str] | None:
    """Return a rank, and what is wrong, that gave no sign between two looks and has not left.

    Of several it is the one that gave its last sign in the lowest step."""
    silent = [
        (new.step, rank)
        for rank, (old, new) in enumerate(zip(before, now, strict=True))
        if rank != here and not new.left and old.beat == new.beat
    ]
    if not silent:
        return None
    return min(silent)[1], "no sign of life: killed, stopped or cut off"


def stuck_rank(signs: Sequence[Sign], here: int) -> tuple[int, str] | None:
    """Return the rank, and what is wrong, for which the others wait; None where none stands out.

    here: the rank that asks, which has waited."""
    staying = [r for r, sign in enumerate(signs) if r != here and not sign.left]
    free = [rank for rank in staying if not signs[rank].waits]
    if free:
        # A wait inside C++ that nothing marks shows by its collectives: the others' rank has fewer.
        rank = min(free, key=lambda r: (signs[r].step, signs[r].begun, r))
        return rank, f"it did not join the others, and is at {signs[rank].line}"
    ended = [r for r, sign in enumerate(signs) if r != here and sign.left == ENDED]
    if ended:
        return ended[0], "it had ended while others still waited for it"
    return _odd_one(signs)


def _odd_one(signs: Sequence[Sign]) -> tuple[int, str] | None:
    """Return the one rank that waits in an earlier step than all others, or at another line."""
    if len(signs) < 3:
        return None
    steps = Counter(sign.step for sign in signs)
    for rank, sign in enumerate(signs):
        alone = steps[sign.step] == 1 and len(steps) == 2
        if alone and sign.step == min(steps):
            return rank, f"it waits in step {sign.step}, at {sign.line}, behind all others"
    return unlike_rank({rank: sign.line for rank, sign in enumerate(signs)})


def unlike_rank(lines: Mapping[int, str]) -> tuple[int, str] | None:
    """Return the one rank of three or more that is at another line than all others, which agree."""
    counts = Counter(lines.values())
    if len(lines) < 3 or len(counts) != 2 or min(counts.values()) > 1:
        return None
    (other, _), (line, _) = counts.most_common()
    rank = next(rank for rank, found in lines.items() if found == line)
    unlike = "the ranks call unlike collectives"
    return rank, f"it is at {line} while all others wait at {other}: {unlike}"
