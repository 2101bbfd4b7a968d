"""Judges runs of a job that is too large for a reference, by a small job in its place. No torch.

The small job, the proxy, is compared as any job is. Where a strategy is equal there, its run of the
real job is equal "at the proxy size", and never plainly equal: the proxy shows that the strategy
computes the same, not that this run did. So the real runs are held against the first of them too,
in the steps that nothing excuses and without their weights."""

import dataclasses
from collections.abc import Mapping

from ..job.schema import Job
from ..job.variants import resolve
from ..records import PROXY, Comparison, Parity, Record
from .differences import Run, find_lost_step
from .parity import compare_runs
from .references import computes_the_same
from .verdict import rule_of


def explain_unproved(name: str, proved: Comparison) -> Record | None:
    """Return the record of a run that is not started, as the proxy does not prove it, or None."""
    small, parity = proved.strategies[name], proved.parity.get(name)
    if small.status == "not_possible":
        return Record(name, "not_possible", f"at the proxy size: {small.reason}")
    if parity is not None and parity.ok:
        return None
    why = "it is not proved at the proxy size, see proxy/compare.md"
    return Record(name, "failed", f"not run at the real size: {why}")


def judge_by_proxy(job: Job, name: str, runs: Mapping[str, Record], proved: Comparison) -> Parity:
    """Return the verdict on a run of the real job, with the figures of the small one."""
    small = dataclasses.replace(proved.parity[name], reference=PROXY)
    if runs[name].status != "ok":
        unmade = Parity(False, None, None, small.tolerance, reference=PROXY)
        return small if not small.ok else dataclasses.replace(unmade, reason=runs[name].reason)
    others = (n for n in runs if runs[n].status == "ok" and computes_the_same(job, n))
    first = next(others, name)
    if first == name or any(find_lost_step(runs[one]) for one in (first, name)):
        return small
    rule = rule_of(resolve(job, runs[name].strategy).job, first, runs, name)
    found = compare_runs(Run(runs[name], {}), Run(runs[first], {}), first, rule)
    where = found.first_difference
    early = where is not None and where.step is not None and where.step < rule.exact_steps
    return found if early else small
