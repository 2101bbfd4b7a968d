"""Judges each run of a comparison from records and weights alone, and starts no run.

`judge_run` returns a verdict, or the control runs that it needs first; the caller makes those and
calls it again."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..job.schema import Job
from ..records import Parity, Record
from .parity import Run, compare_runs
from .tolerances import EXACT_STEPS, tolerance

EMULATION = "_emulation"  # after the name of a run of local SGD
# Control runs cut each batch into these numbers of micro-batches, which reorders the same sums.
CONTROL_MICRO_BATCHES = (1, 3, 7)


@dataclasses.dataclass(frozen=True)
class Control:
    """Names a further run that a verdict needs: a strategy or variant with other settings."""

    label: str
    strategy: str
    changes: dict[str, Any]


def judge_run(
    job: Job,
    name: str,
    runs: Mapping[str, Record],
    reference: str,
    controls: Mapping[str, Record],
    load: Callable[[str], Run],
) -> Parity | list[Control]:
    """Return the verdict on the run `name`, or the control runs that are missing for it.

    The run is compared with `runs[reference]`; local SGD is compared with its emulation in one
    process, which is a control. job: with the settings of `name`, if that is a variant. load:
    returns the run or control of a label with its final weights."""
    record, strategy = runs[name], runs[name].variant_of or name
    allowed = _allowed(job, strategy)
    undecided = Parity(False, None, None, allowed)
    if record.status != "ok":
        return undecided
    if name == reference:
        return Parity(True, 0.0, 0.0, allowed, reference=reference, state="equal")
    against, changes, known = reference, {}, runs
    if strategy == "local_sgd":
        against, known = name + EMULATION, controls
        changes = {"emulate_replicas": record.layout["dp"]}
        if against not in controls:
            return [Control(against, name, changes)]
    if known[against].status != "ok":
        return undecided
    run, expected, exact = load(name), load(against), EXACT_STEPS[job.train.precision]
    factors = _factors(job, strategy, record)
    strict = compare_runs(run, expected, against, allowed, factors, (), exact)
    late = strict.first_difference
    if late is None or (late.step is not None and late.step < exact):
        return strict
    wanted = _summing_orders(against, known[against].strategy, changes)
    if missing := [control for control in wanted if control.label not in controls]:
        return missing
    usable = [load(c.label) for c in wanted if controls[c.label].status == "ok"]
    return compare_runs(run, expected, against, allowed, factors, usable, exact)


def _allowed(job: Job, strategy: str) -> dict[str, float]:
    hook = job.strategy.ddp.comm_hook if strategy == "ddp" else "none"
    return tolerance(job.train.precision, hook)


def _factors(job: Job, strategy: str, record: Record) -> dict[str, int]:
    """Return the numbers by which a wrong scale would be off."""
    ranks = record.layout["dp"]
    return {"micro-batches": job.micro_batches(strategy), "data-parallel ranks": ranks}


def _summing_orders(against: str, strategy: str, changes: dict[str, Any]) -> list[Control]:
    """List the controls that show how far rounding goes: the same sums in other orders."""
    return [
        Control(f"{against}_cut_{cut}", strategy, changes | {"micro_batches": cut})
        for cut in CONTROL_MICRO_BATCHES
    ]
