"""Chooses the runs of a comparison and the one that the others are held against. No torch here.

That is `single`, one process in plain torch, unless the user names another. Where nobody asked for
`single` by name and it cannot hold the model, the first run that computes the same takes its place,
and what else nobody asked for and lacks memory is not possible here either.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from ..job.errors import JobError
from ..job.schema import Job
from ..job.variants import resolve
from ..launch.failures import is_for_memory
from ..records import PROXY, Record
from ..strategies import registry
from .tolerances import hook_of

SINGLE = "single"


@dataclasses.dataclass(frozen=True)
class Selection:
    """Holds the names of the runs, and of the one that the others are to be held against.

    `fixed` is False where another run may take the reference's place. `unasked` are the runs that
    nobody named: they are part of "all strategies"."""

    names: tuple[str, ...]
    reference: str
    fixed: bool
    unasked: frozenset[str] = frozenset()

    def by_proxy(self) -> "Selection":
        """Return the same runs of the real job, without a reference that nobody asked for."""
        if self.fixed:
            return self
        names = tuple(name for name in self.names if name != self.reference)
        return Selection(names, PROXY, False, self.unasked)


def select(job: Job, strategies: Sequence[str] | None, reference: str | None) -> Selection:
    """Return the runs that are asked for; without `strategies`, all and all variants of the job.

    Raises JobError if `reference` does not compute what the others do."""
    asked = (*registry.NAMES, *job.variant) if strategies is None else strategies
    names = tuple(dict.fromkeys([reference or SINGLE, *asked]))
    if reference and not computes_the_same(job, reference):
        raise JobError(
            f"--reference {reference!r}: does not compute what the others do; valid: a strategy "
            "or variant other than local_sgd, and without a comm_hook"
        )
    named = {reference, *(job.variant if strategies is None else strategies)}
    unasked = frozenset(names) - named
    return Selection(names, names[0], SINGLE not in unasked or bool(reference), unasked)


def computes_the_same(job: Job, name: str) -> bool:
    """Tell whether a run computes what `single` does, up to rounding in the job's precision.

    Local SGD is another algorithm, and a communication hook rounds gradients."""
    choice = resolve(job, name)
    return choice.strategy != "local_sgd" and hook_of(choice.job, choice.strategy) == "none"


def find_reference(
    job: Job, selection: Selection, runs: Mapping[str, Record], has_proxy: bool
) -> str:
    """Return the name of the run that the others are held against, once all have ended."""
    wanted = selection.reference
    if wanted not in runs or not _cannot_run(runs[wanted]):
        return wanted
    if selection.fixed:
        return PROXY if has_proxy else wanted
    usable = (n for n in runs if runs[n].status == "ok" and computes_the_same(job, n))
    return next(usable, wanted)


def find_too_large(
    selection: Selection, runs: Mapping[str, Record], reference: str
) -> dict[str, Record]:
    """Return new records of the runs that lack memory and that nobody needs, as not possible here.

    Those are a reference that another one stands in for and, where not even `single` can hold the
    model, what nobody asked for by name. Where it can, a run that lacks memory has failed."""
    wanted, single = selection.reference, runs.get(SINGLE)
    names = {wanted} & set(runs) - {reference}
    held = [run for run in runs.values() if run.status == "ok"]
    if held if reference == PROXY else runs[reference] in held:
        names |= selection.unasked if single is None or _cannot_run(single) else set()
    return {
        name: dataclasses.replace(run, status="not_possible")
        for name, run in runs.items()
        if name in names and _lacks_memory(run)
    }


def _cannot_run(record: Record) -> bool:
    """Tell whether a run was not possible, or failed for a lack of memory."""
    return record.status == "not_possible" or _lacks_memory(record)


def _lacks_memory(record: Record) -> bool:
    return record.status == "failed" and is_for_memory(record.reason or "")
