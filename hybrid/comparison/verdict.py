"""Judges each run of a comparison from records and weights alone, and starts no run.

`judge_run` returns a verdict, or the further runs in one process that it needs first; the caller
makes those and calls it again. None is asked for whose result could not change the verdict."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..job.schema import Job
from ..records import Parity, Record
from .causes import Facts
from .differences import Run, differences
from .noise import ROUNDED, can_be_rounding
from .parity import Rule, compare_runs, words_needed
from .repeats import AGAIN, find_trusted, repeats_its_bits
from .tolerances import EXACT_STEPS, rounding_floor, tolerance

EMULATION = "_emulation"  # after the name of a run of local SGD
# Control runs cut each batch into these numbers of micro-batches, which reorders the same sums. The
# later ones run where the first do not spread so far: a kink, such as relu's at 0, shows by chance.
CONTROL_MICRO_BATCHES = (1, 3, 7, 2, 5, 11)
NUM_CONTROLS = 3
KINDS = {"cut": "micro_batches", "moved": "move_weights"}  # of controls: the setting of each
LARGEST_KINK = 1e-2  # relative; a larger difference is not looked for in further controls


@dataclasses.dataclass(frozen=True)
class Control:
    """Names a further run that a verdict needs: a strategy or variant with other settings."""

    label: str
    strategy: str
    changes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Case:
    """Holds what one verdict is about: the run, what it is compared with, and further runs.

    against: the label of the reference; known: the records in which it is found."""

    job: Job
    name: str
    runs: Mapping[str, Record]
    against: str
    changes: dict[str, Any]
    controls: Mapping[str, Record]
    load: Callable[[str], Run]

    @property
    def known(self) -> Mapping[str, Record]:
        return {**self.controls, **self.runs}

    def control(self, label: str, **changes: Any) -> Control:
        """Name a further run like the reference, with these changes."""
        return Control(label, self.known[self.against].strategy, self.changes | changes)


def judge_run(
    job: Job,
    name: str,
    runs: Mapping[str, Record],
    reference: str,
    controls: Mapping[str, Record],
    load: Callable[[str], Run],
) -> Parity | list[Control]:
    """Return the verdict on the run `name`, or the further runs that are missing for it.

    The run is compared with `runs[reference]`; local SGD is compared with its emulation in one
    process, which is a control. job: with the settings of `name`, if that is a variant. load:
    returns the run or control of a label with its final weights."""
    record, strategy = runs[name], runs[name].variant_of or name
    allowed = tolerance(job.train.precision, _hook(job, strategy))
    undecided = Parity(False, None, None, allowed)
    if record.status != "ok":
        return undecided
    if name == reference:
        return Parity(True, 0.0, 0.0, allowed, reference=reference, state="equal")
    against, changes = reference, dict[str, Any]()
    if strategy == "local_sgd":
        against, changes = name + EMULATION, {"emulate_replicas": record.layout["dp"]}
        if against not in controls:
            return [Control(against, name, changes)]
    case = _Case(job, name, runs, against, changes, controls, load)
    if case.known[against].status != "ok":
        return undecided
    if cut := _other_overflows(case):
        if cut.label not in controls:
            return [cut]
        if controls[cut.label].status == "ok":
            case = dataclasses.replace(case, against=cut.label, changes=cut.changes)
    return _judge(case, rule_of(job, case.against, case.known, name))


def rule_of(job: Job, against: str, known: Mapping[str, Record], name: str | None = None) -> Rule:
    """Return by how much a run may differ from the reference `against`, in `known` as the run is.

    name: of the run; left out, the rule is that for two runs of the reference."""
    strategy = (known[name].variant_of or name) if name else against
    allowed, factors = tolerance(job.train.precision, _hook(job, strategy)), dict[str, int]()
    if name:
        factors["micro-batches"] = job.micro_batches(strategy)
        factors["data-parallel ranks"] = known[name].layout["dp"]
    floor = rounding_floor(job, known[against].steps)
    facts = Facts(factors, allowed["loss"], job.train.clip_norm)
    return Rule(allowed, EXACT_STEPS[job.train.precision], floor, facts)


def _other_overflows(case: _Case) -> Control | None:
    """Return the reference cut as the run is, if gradients overflow in other steps; only in fp16.

    An fp16 gradient is summed over a micro-batch, and a larger one overflows where a smaller one
    does not. Such a step is skipped, in one run alone."""
    record, expected = case.runs[case.name], case.known[case.against]
    pairs = zip(record.steps, expected.steps, strict=False)
    if all(mine.skipped == theirs.skipped for mine, theirs in pairs):
        return None
    pieces = record.layout["dp"] * case.job.micro_batches(record.variant_of or case.name)
    return case.control(f"{case.against}_cut_{pieces}", micro_batches=pieces)


def _hook(job: Job, strategy: str) -> str:
    """Return the communication hook of a strategy."""
    return job.strategy.ddp.comm_hook if strategy == "ddp" else "none"


def _judge(case: _Case, rule: Rule) -> Parity | list[Control]:
    """Compare strictly, then with controls, then with a reference that was seen to repeat."""
    run, expected = case.load(case.name), case.load(case.against)
    found = differences(run, expected, rule.tolerance, rule.floor)
    verdict = compare_runs(run, expected, case.against, rule)
    if not found:
        return verdict
    if all(can_be_rounding(one, rule.exact_steps) for one in found):
        judged = _judge_with_controls(case, rule, run, expected)
        if isinstance(judged, list) or judged.ok:
            return judged
        verdict = judged
    if found[0].quantity not in (*ROUNDED, "initial weights"):
        return verdict  # no rounding and no fault of arithmetic does that
    return _judge_reference(case, rule, verdict)


def _judge_with_controls(
    case: _Case, rule: Rule, run: Run, expected: Run
) -> Parity | list[Control]:
    """Return the verdict with controls, or those that are missing."""
    wanted, usable = _list_controls(case), dict[str, Run]()
    for control in wanted:
        if control.label not in case.controls:
            return [control]
        if case.controls[control.label].status == "ok":
            usable[control.label] = case.load(control.label)
        if len(usable) < min(NUM_CONTROLS, len(wanted)):
            continue
        verdict = compare_runs(run, expected, case.against, rule, usable)
        if verdict.ok:
            return verdict
        words = words_needed(run, expected, rule, usable)
        again = [case.control(f"{label}{AGAIN}", **_changes_of(label)) for label in words]
        if missing := [one for one in again if one.label not in case.controls]:
            return missing
        repeated = [label for label in words if repeats_its_bits(label, case.controls, case.load)]
        verdict = compare_runs(run, expected, case.against, rule, usable, repeated)
        if verdict.ok:
            return verdict
        if differences(run, expected, rule.tolerance, rule.floor)[0].size > LARGEST_KINK:
            return verdict
    return compare_runs(run, expected, case.against, rule, usable)


def _judge_reference(case: _Case, rule: Rule, verdict: Parity) -> Parity | list[Control]:
    """Return a verdict that does not hold, once the reference has repeated its bits."""
    trusted = find_trusted(case.against, case.known, case.load, rule)
    if trusted.missing:
        return [case.control(trusted.missing)]
    if trusted.fault and not trusted.label:
        return dataclasses.replace(verdict, state="not_decided")
    return verdict


def _changes_of(label: str) -> dict[str, int]:
    """Return the setting of the control of that label."""
    _, kind, number = label.rsplit("_", 2)
    return {KINDS[kind]: int(number)}


def _list_controls(case: _Case) -> list[Control]:
    """List the controls that show how far rounding goes: the same sums in other orders.

    A cut into as many pieces as the reference's own, or into more than there are samples, is no
    other order. Where too few are left, weights are moved by one rounding after the first step."""
    reference = case.known[case.against]
    strategy = reference.variant_of or reference.strategy
    share = -(-case.job.train.global_batch // case.changes.get("emulate_replicas", 1))
    own = case.changes.get("micro_batches", case.job.micro_batches(strategy))
    labels, seen = [], {min(own, share)}
    for cut in CONTROL_MICRO_BATCHES:
        if min(cut, share) not in seen:
            seen.add(min(cut, share))
            labels.append(f"{case.against}_cut_{cut}")
    if strategy in ("single", "local_sgd"):
        few = range(1, NUM_CONTROLS + 1 - len(labels))
        labels += [f"{case.against}_moved_{seed}" for seed in few]
    return [case.control(label, **_changes_of(label)) for label in labels]
