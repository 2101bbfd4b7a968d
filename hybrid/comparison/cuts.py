"""Holds a run of a model with batch norm against `single` cut alike. No torch here.

Such a layer takes its statistics of a micro-batch, so what it computes depends on how a batch is
cut. Two runs are alike only if the same samples share a micro-batch. Those of a run with R ranks
and M micro-batches on each are those of `single` that plays R ranks with M each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..job.schema import Job
from ..layout import micro_batch_size
from ..records import Record

NAMED = 2  # layers, at most, before it says how many there are


@dataclasses.dataclass(frozen=True)
class Cut:
    """Holds how a run cuts a batch: into the shares of its ranks, and these into micro-batches."""

    ranks: int
    micro_batches: int

    def samples(self, job: Job) -> int:
        """Return how many samples the largest micro-batch has."""
        return micro_batch_size(job.train.global_batch, self.ranks, self.micro_batches)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings with which `single` cuts so."""
        ranks = self.ranks if self.ranks > 1 else None
        return {"emulate_ranks": ranks, "micro_batches": self.micro_batches}


def cut_of(job: Job, record: Record) -> Cut:
    """Return how a run cut its batches. job: with the settings of a variant, if it is one."""
    strategy = record.variant_of or record.strategy
    return Cut(record.layout.get("dp", 1), job.micro_batches(strategy))


def find_cut(
    job: Job, name: str, runs: Mapping[str, Record], reference: str, layers: Sequence[str]
) -> Cut | None:
    """Return how `single` must be cut to be compared with a run; None: as it is.

    layers: those whose result depends on the cut. Another reference than `single` cannot be cut
    like a run."""
    known = runs.get(reference)
    if not layers or known is None or (known.variant_of or known.strategy) != "single":
        return None
    mine = cut_of(job, runs[name])
    return None if mine == cut_of(job, known) else mine


def explain_cut(job: Job, mine: Cut, theirs: Cut, other: str, layers: Sequence[str]) -> str:
    """Say in what the micro-batches of a run and those of another differ, for these layers."""
    named = ", ".join(layers[:NAMED])
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    verb = "take" if len(layers) > 1 else "takes"
    here, there = mine.samples(job), theirs.samples(job)
    samples = f"{here} sample{'' if here == 1 else 's'} here and {there} under {other}"
    words = f"{named}{more} {verb} statistics of a micro-batch, which has {samples}"
    pieces, others = mine.ranks * mine.micro_batches, theirs.ranks * theirs.micro_batches
    if pieces == others:
        return f"{words}, and keeps running ones of the first rank's micro-batches"
    if others % mine.ranks == 0:
        return f"{words}; micro_batches = {others // mine.ranks} in its section makes them the same"
    return f"{words}; micro_batches = {pieces} in the section of {other} makes them the same"
