"""Plans the runs of a comparison: the layout of each, or why it cannot run. No torch here."""

import dataclasses
from collections.abc import Sequence

from ..job.errors import JobError, Unsupported
from ..layout import Layout, LayoutError
from ..training.check import CheckedJob, print_warnings
from .interruption import Interruption, check_step, explain_refusal


def plan_runs(
    checked: CheckedJob, names: Sequence[str], nproc: int, title: str
) -> dict[str, Layout | str]:
    """Find the layout of each strategy, or why it cannot run here, and print the warnings."""
    layouts: dict[str, Layout | str] = {}
    warnings: list[str] = []
    for name in names:
        try:
            layouts[name], found = checked.plan(name, nproc)
            warnings += [f"{title}{name}: {line}" for line in found]
        except LayoutError as error:
            raise JobError(f"{error} (--nproc {nproc})") from None
        except Unsupported as error:
            layouts[name] = str(error)
    print_warnings([*warnings, *(f"{title}{line}" for line in checked.warnings())])
    return layouts


@dataclasses.dataclass(frozen=True)
class Second:
    """Holds how the interrupted runs go on, by their names.

    layouts: in which layout. refused: which cannot be interrupted so, and why."""

    layouts: dict[str, Layout | str]
    refused: dict[str, str]


def plan_second(
    checked: CheckedJob,
    stop: Interruption,
    layouts: dict[str, Layout | str],
    reference: str,
    nproc: int,
    title: str,
) -> Second:
    """Find in which layout each run but the reference goes on; raises JobError.

    layouts: those in which they begin."""
    check_step(stop.step, checked.job, "the proxy" if title else "the job")
    known = dict(layouts)
    if stop.resume_as and stop.resume_as not in known:
        known |= plan_runs(checked, [stop.resume_as], nproc, title)
    refused = {}
    for name in layouts:
        second, layers = stop.second(name), checked.summary.batch_norms
        why = explain_refusal(checked.job, name, second, known, layers)
        if why and name != reference:
            refused[name] = why
    return Second({name: known[stop.second(name)] for name in layouts}, refused)
