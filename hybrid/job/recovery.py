"""This module defines the sections of a job by which a run survives: [checkpoint] and [guard].

It needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from .strategy_settings import Positive, Section


def _over_one(factor: float) -> float:
    """Allow 0, which is off, and factors above 1: the usual loss is no spike."""
    if factor != 0 and not 1 < factor < float("inf"):
        raise PydanticCustomError("factor", "valid: 0 (off), or a number above 1")
    return factor


class Checkpoint(Section):
    """Says when the whole training state is saved, for a run to go on from (docs/checkpoints.md).

    every: so many optimizer steps, and after the last one; left out, the final weights alone are
    saved. keep: so many of the newest, all where it is left out; best: and the one whose evaluation
    is best by this metric: loss, accuracy, perplexity or a name in `train.metrics`. async: a thread
    writes a copy of the state while training goes on."""

    model_config = ConfigDict(validate_by_name=True)

    every: Positive | None = None
    keep: Positive | None = None
    best: str | None = None
    asynchronous: bool = Field(default=False, alias="async")

    @property
    def evaluates(self) -> bool:
        """Tell whether the state is evaluated each time that it is saved."""
        return None not in (self.every, self.keep, self.best)

    def warnings(self) -> list[str]:
        """Return a line for each key that has no effect for want of another."""
        found = []
        if self.every is None:
            given = {"keep": self.keep, "best": self.best, "async": self.asynchronous or None}
            keys = [key for key, value in given.items() if value is not None]
            found = [f"checkpoint.{key} has no effect without checkpoint.every" for key in keys]
        elif self.best and self.keep is None:
            found = ["checkpoint.best has no effect without checkpoint.keep: all are kept"]
        return found


Policy = Literal["stop", "skip", "roll_back"]


class Guard(Section):
    """Says what becomes of a step that goes wrong, before its update (docs/checkpoints.md).

    non_finite: of one whose loss or gradient norm is not finite. on_spike: of one whose loss is
    over `spike_factor` times the median of the last `window` good ones; 0: none is. stop: the run
    ends. skip: no update is made. roll_back: nor any since the newest checkpoint, whose state comes
    back. max_in_a_row: so many such steps one after another end the run under each policy."""

    non_finite: Policy = "stop"
    spike_factor: Annotated[float, AfterValidator(_over_one)] = 0.0
    window: Positive = 20
    on_spike: Policy = "stop"
    max_in_a_row: Positive = 10
