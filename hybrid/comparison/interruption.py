"""Says where each run of a comparison is interrupted, and under what it is resumed. No torch here.

Such a run is stopped after some optimizer steps, with its state saved; new processes go on from
there, under the same strategy or under another one. It is held against a reference that was never
stopped, as any run is: a test of checkpoints for one's own model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..job.errors import JobError
from ..job.schema import Job
from ..job.variants import resolve
from ..layout import Layout
from .references import computes_the_same


@dataclasses.dataclass(frozen=True)
class Interruption:
    """Says after how many optimizer steps each run but the reference stops, and how it goes on.

    resume_as: the name of a strategy or variant; None: each run goes on as what it was."""

    step: int
    resume_as: str | None = None

    def second(self, name: str) -> str:
        """Return the name under which a run goes on."""
        return self.resume_as or name

    def describe(self) -> dict[str, Any]:
        """Return what `session.json` says of it."""
        return {"interrupt": {"step": self.step, "resume_as": self.resume_as}}


def make_interruption(step: int | None, resume_as: str | None) -> Interruption | None:
    """Return what `--interrupt` and `--resume-as` ask for together; raises JobError."""
    if step is None and resume_as is not None:
        raise JobError(f"--resume-as {resume_as}: valid with --interrupt STEP")
    return None if step is None else Interruption(step, resume_as)


def check_step(step: int, job: Job, what: str) -> None:
    """Raise JobError unless a run can stop after `step` steps and have some left.

    job: with its length in steps. what: the job's name in the message."""
    steps = job.train.steps or 0
    if not 1 <= step < steps:
        valid = f"1 to {steps - 1}" if steps > 1 else "a job of 2 steps or more"
        raise JobError(f"--interrupt {step}: {what} has {steps} steps; valid: {valid}")


def explain_refusal(
    job: Job,
    name: str,
    second: str,
    layouts: Mapping[str, Layout | str],
    layers: Sequence[str],
) -> str | None:
    """Say why a run cannot be interrupted under one name and resumed under another.

    None: it can. layouts: where a strategy cannot run, the reason. layers: those whose result
    depends on how a batch is cut."""
    if name == second:
        return None
    here, there = layouts[name], layouts[second]
    if isinstance(here, str):
        return here
    if isinstance(there, str):
        return f"resumed as {second}: {there}"
    if not (computes_the_same(job, name) and computes_the_same(job, second)):
        odd = next(one for one in (name, second) if not computes_the_same(job, one))
        return (
            f"resumed as {second}: no run is the reference of both, since {odd} computes something "
            "else than the others do"
        )
    cuts = []
    for layout, choice in ((here, resolve(job, name)), (there, resolve(job, second))):
        cuts.append((layout.dp, choice.job.micro_batches(choice.strategy)))
    if layers and cuts[0] != cuts[1]:
        (ranks, pieces), (others, rest) = cuts
        return (
            f"resumed as {second}: no run is the reference of both, since {layers[0]} takes "
            f"statistics of a micro-batch, and the batch is cut into {ranks} x {pieces} under "
            f"{name} and {others} x {rest} under {second}"
        )
    return None
