"""This module defines what a try-out finds. It needs no torch."""

import dataclasses
from collections.abc import Collection, Iterable

from ...job.variants import Choice

SHARDED = ("fsdp", "zero1", "zero2", "zero3")
STAGED = ("pipeline", "2d")
SEVERAL = ("ddp", "local_sgd", *SHARDED, *STAGED)  # those that cut a batch among processes
SHOWN = 4  # names listed in one line; the others are counted


@dataclasses.dataclass(frozen=True)
class Finding:
    """Says in one line what stands in a job's way, by name, and what the job can do about it.

    strategies: those that it touches, by their own names; empty: all of them. fatal: where it
    touches all no run could be right, and where it touches some these are not possible. Others are
    warnings, which stand in the record. staged_by: it touches no stages but those that
    this engine runs, deepspeed or torch; None: all."""

    text: str
    strategies: tuple[str, ...] = ()
    fatal: bool = False
    staged_by: str | None = None

    def touches(self, choice: Choice) -> bool:
        """Return whether a strategy or variant has to do with this."""
        if self.staged_by and choice.strategy in STAGED:
            engine = "torch" if choice.job.stages_by_torch(choice.strategy) else "deepspeed"
            if engine != self.staged_by:
                return False
        return not self.strategies or choice.strategy in self.strategies

    def bars_all(self) -> bool:
        """Return whether no run of the job could be right."""
        return self.fatal and not self.strategies

    def show(self) -> str:
        """Return the line with the strategies that it is about."""
        if not self.strategies:
            return self.text
        several = self.strategies == SEVERAL
        return f"{'all but single' if several else ', '.join(self.strategies)}: {self.text}"


def list_names(names: Collection[str]) -> str:
    """Join names as in a sentence, the first few of many: `a, b and 3 more`."""
    shown = list(names)
    if len(shown) > SHOWN:
        shown = [*shown[: SHOWN - 1], f"{len(shown) - SHOWN + 1} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), *shown[-1:]]))


def first_fatal(findings: Iterable[Finding]) -> Finding | None:
    """Return the first finding by which no run could be right, None where there is none."""
    return next((found for found in findings if found.bars_all()), None)
