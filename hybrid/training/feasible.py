"""Says what stands in the way of which strategy of a job: `hybrid check`. No torch until then."""

import dataclasses
from collections.abc import Sequence

from ..job.errors import JobError, Unsupported
from ..job.schema import Job
from ..job.variants import warnings_of
from ..launch.warm import warm_ranks
from ..layout import LayoutError
from ..strategies import registry
from .apart import check_apart
from .early import check_early
from .tryout.finding import Finding, first_fatal


@dataclasses.dataclass(frozen=True)
class Feasible:
    """Says whether a run can be made: `reason` where it cannot, and what to know where it can."""

    possible: bool
    reason: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Holds what a check found.

    `findings` are those of the try-out, `warnings` those of the job's settings. `ok` is False where
    none of the runs that were asked for can be made."""

    ok: bool
    nproc: int
    findings: list[Finding]
    warnings: list[str]
    strategies: dict[str, Feasible]

    def why_not(self) -> str:
        """Return in one line why no run can be made."""
        if found := first_fatal(self.findings):
            return found.text
        return "; ".join(f"{name}: {one.reason}" for name, one in self.strategies.items())

    def lines(self) -> list[str]:
        """Return what a person reads: each finding, and then each run by its name."""
        kinds = {True: "in the way", False: "warning"}
        shown = [f"{kinds[found.fatal]}: {found.show()}" for found in self.findings]
        shown += [f"warning: {line}" for line in self.warnings]
        width = max(map(len, self.strategies))
        told = {found.text for found in self.findings}
        for name, one in self.strategies.items():
            state = "possible" if one.possible else "not possible"
            notes = [one.reason] if one.reason else one.warnings
            notes = [note for note in notes if note not in told]
            shown.append(f"{name:{width}}  {': '.join([state, *filter(None, ['; '.join(notes)])])}")
        return shown


def check_strategies(
    job: Job, names: Sequence[str] | None = None, nproc: int | None = None
) -> Answer:
    """Try a job out, and say which strategies and variants can run it on `nproc` processes.

    names: left out, all strategies and all variants of the job. nproc: left out, as for a
    comparison. Raises JobError where the job is wrong before it can be tried out."""
    names = [*registry.NAMES, *job.variant] if names is None else names
    registry.check_settings(job, names)
    nproc = check_early(job, names, nproc, starts=False)
    with warm_ranks():
        checked = check_apart(job, registry.modules("single"))
    found = {}
    for name in names:
        try:
            _, warnings = checked.plan(name, nproc)
            found[name] = Feasible(True, None, [*warnings, *checked.warnings(name)])
        except LayoutError as error:
            raise JobError(f"{error} (--nproc {nproc})") from None
        except Unsupported as error:
            found[name] = Feasible(False, str(error))
    possible = any(one.possible for one in found.values())
    findings = list(checked.findings)
    return Answer(possible, nproc, findings, warnings_of(job, names), found)
