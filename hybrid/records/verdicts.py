"""This module defines what a comparison says of its runs; `hybrid.records` has the rest."""

import dataclasses
from typing import Any, Literal

ParityState = Literal["equal", "not_equal", "not_compared", "not_decided"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Names the first place where a run left its reference."""

    step: int | None
    quantity: str
    got: float | str | None
    expected: float | str | None
    likely_cause: str | None = None


@dataclasses.dataclass(frozen=True)
class Parity:
    """Holds the verdict on one strategy; `ok` is true of the state "equal" alone.

    A run is "not_compared" where it or its reference has no result, which `reason` explains, and
    "not_decided" where the reference does not repeat and no run of it can be trusted. `reference`
    is "proxy" where a small job proved the strategies equal and this one is the real job.
    `excused` lists what is past the tolerance where control runs, the reference with its batches
    summed in other orders, are apart from one another by at least a quarter as much: `step`,
    `quantity`, `difference`, `control` (their spread), `tensors` (how many, for final weights),
    `kink` (the spread came within one step). `refused` names controls that left the reference in
    the exact steps and so excuse nothing. `reference_because` says why the run has a reference of
    its own."""

    ok: bool
    max_loss_diff: float | None
    max_weight_diff: float | None
    tolerance: dict[str, float]
    first_difference: Difference | None = None
    reference: str = "single"
    max_grad_norm_diff: float | None = None
    excused: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    state: ParityState = "not_compared"
    reason: str | None = None
    refused: list[str] = dataclasses.field(default_factory=list)
    reference_because: str | None = None


@dataclasses.dataclass(frozen=True)
class ReferenceFault:
    """Says where a run of the reference was off, which did not repeat its own bits.

    `size` is the relative difference from its other runs at that `step` (None: after the last one)
    and in that `quantity`. `runs` are the labels of the runs of the reference that were off."""

    step: int | None
    quantity: str
    size: float | None
    runs: list[str]


@dataclasses.dataclass(frozen=True)
class Best:
    """Names the equal runs that cost least; None where no run has that figure.

    `fastest` by samples a second, `least_memory` by the greatest peak of a rank, `fewest_bytes` by
    the greatest number of bytes that a rank sends in a step, of the runs with several ranks."""

    fastest: str | None = None
    least_memory: str | None = None
    fewest_bytes: str | None = None
