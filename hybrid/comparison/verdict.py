"""Judges each run of a comparison from records and weights alone, and starts no run.

`judge_run` returns a verdict, or the further runs in one process that it needs first; the caller
makes those and calls it again. None is asked for whose result could not change the verdict."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from ..job.schema import Job
from ..records import Parity, Record
from .causes import Facts
from .controls import (
    LARGEST_KINK,
    NUM_CONTROLS,
    Case,
    Control,
    cut_alike,
    is_cut_alike,
    list_controls,
)
from .cuts import cut_of, explain_cut, find_cut
from .differences import Run, differences, find_lost_step, relative
from .followed import judge_follower
from .noise import ROUNDED, can_be_rounding, is_near
from .parity import Rule, compare_runs, words_needed
from .repeats import AGAIN, find_trusted, repeats_its_bits
from .tolerances import EXACT_STEPS, hook_of, rounding_floor, tolerance

EMULATION = "_emulation"  # after the name of a run of local SGD
GROWTH = 10.0  # by which rounding can grow at most from what it was before a step


def judge_run(
    job: Job,
    name: str,
    runs: Mapping[str, Record],
    reference: str,
    controls: Mapping[str, Record],
    load: Callable[[str], Run],
    layers: Sequence[str] = (),
) -> Parity | list[Control]:
    """Return the verdict on the run `name`, or the further runs that are missing for it.

    The run is compared with `runs[reference]`; local SGD is compared with its emulation in one
    process, which is a control, as is `single` cut like the run. job: with the settings of `name`,
    if that is a variant. load: returns the run or control of a label with its final weights.
    layers: those whose result depends on how a batch is cut."""
    record, strategy = runs[name], runs[name].variant_of or runs[name].strategy
    allowed = tolerance(job.train.precision, hook_of(job, strategy))
    undecided = Parity(False, None, None, allowed)
    if record.status != "ok":
        return undecided
    if lost := find_lost_step(record):
        return dataclasses.replace(undecided, reason=lost)
    if name == reference:
        return Parity(True, 0.0, 0.0, allowed, reference=reference, state="equal")
    wanted, why = _find_expected(job, name, runs, reference, layers)
    against = wanted.label
    if against != reference and against not in controls:
        return [wanted]
    if why:
        undecided = dataclasses.replace(undecided, reference=against, reference_because=why)
    rest = against, controls, load, layers, wanted.cores_for
    case = Case(job, name, runs, against, wanted.changes, *rest)
    if case.known[against].status != "ok":
        return undecided
    if lost := find_lost_step(case.known[against]):
        return dataclasses.replace(undecided, reason=f"the reference {against}: {lost}")
    verdict = _judge(case, rule_of(job, against, case.known, name, layers))
    if isinstance(verdict, list):
        return verdict
    return dataclasses.replace(verdict, reference_because=undecided.reference_because)


def _find_expected(
    job: Job, name: str, runs: Mapping[str, Record], reference: str, layers: Sequence[str]
) -> tuple[Control, str | None]:
    """Return what a run is compared with, and why where that is the reference cut like the run."""
    record = runs[name]
    if (record.variant_of or record.strategy) == "local_sgd":
        changes = {"emulate_replicas": record.layout["dp"]}
        return Control(name + EMULATION, record.strategy, changes), None
    if cut := find_cut(job, name, runs, reference, layers):
        label = f"{reference}_cut_{cut.ranks}x{cut.micro_batches}"
        why = explain_cut(job, cut, cut_of(job, runs[reference]), reference, layers)
        return Control(label, reference, cut.settings, record.world_size), why
    return Control(reference, reference, {}), None


def rule_of(
    job: Job,
    against: str,
    known: Mapping[str, Record],
    name: str | None = None,
    layers: Sequence[str] = (),
) -> Rule:
    """Return by how much a run may differ from the reference `against`, in `known` as the run is.

    name: of the run; left out, the rule is that for two runs of the reference. layers: those whose
    result depends on how a batch is cut."""
    strategy = (known[name].variant_of or known[name].strategy) if name else against
    allowed, factors = tolerance(job.train.precision, hook_of(job, strategy)), dict[str, int]()
    if name:
        factors["micro-batches"] = job.micro_batches(strategy)
        factors["data-parallel ranks"] = known[name].layout["dp"]
    floor, apart = rounding_floor(job, known[against].steps), None
    if name and layers and against in known and "_cut_" not in against and strategy != "local_sgd":
        mine, theirs = cut_of(job, known[name]), cut_of(job, known[against])
        if mine != theirs:
            apart = explain_cut(job, mine, theirs, against, layers)
    facts = Facts(factors, allowed["loss"], job.train.clip_norm, apart)
    return Rule(allowed, EXACT_STEPS[job.train.precision], floor, facts)


def _judge(case: Case, rule: Rule) -> Parity | list[Control]:
    """Compare strictly, then with the reference cut alike, with controls, with its second run."""
    run, expected = case.load(case.name), case.load(case.root)
    found = differences(run, expected, rule.tolerance, rule.floor)
    verdict = compare_runs(run, expected, case.root, rule)
    if is_cut_alike(case) and (fault := _judge_follower(case, run, expected, rule)):
        return _judge_reference(case, rule, fault)
    if not found:
        return verdict
    cases = [case]
    if cut := cut_alike(case, found):
        if cut.label not in case.known:
            return [cut]
        if _rounds_apart(case, cut.label, rule):
            cases.insert(0, dataclasses.replace(case, against=cut.label))
            alike = compare_runs(run, case.load(cut.label), cut.label, rule)
            fault = _judge_follower(cases[0], run, case.load(cut.label), rule)
            if alike.ok or fault:
                return _judge_reference(case, rule, fault or alike)
    for one in cases:
        expected = case.load(one.against)
        apart = differences(run, expected, rule.tolerance, rule.floor)
        if all(can_be_rounding(other, rule.exact_steps) for other in apart):
            judged = _judge_with_controls(one, rule, run, expected)
            if isinstance(judged, list) or judged.ok:
                return judged
            verdict = judged
    if found[0].quantity not in (*ROUNDED, "initial weights"):
        return verdict  # no rounding and no fault of arithmetic does that
    return _judge_reference(case, rule, verdict)


def _rounds_apart(case: Case, label: str, rule: Rule) -> bool:
    """Tell whether rounding alone can be what parts a run of the reference from the reference.

    In bf16 and fp16 they agree in the first step, and nearly in the other exact ones, but for
    overflows. In fp32 rounding grows from step to step, and a fault jumps."""
    if case.known[label].status != "ok":
        return False
    one, other = case.load(label), case.load(case.root)
    apart = differences(one, other, rule.tolerance, rule.floor)
    if case.job.train.precision != "fp32":
        early = [found for found in apart if not can_be_rounding(found, rule.exact_steps)]
        return all(
            found.size == math.inf or (can_be_rounding(found, 1) and is_near(found, rule.tolerance))
            for found in early
        )
    if not all(can_be_rounding(found, 1) for found in apart):
        return False
    for quantity in ("loss", "grad_norm"):
        most = rule.tolerance[quantity] / 4
        for mine, theirs in zip(one.record.steps, other.record.steps, strict=False):
            size = relative(getattr(mine, quantity), getattr(theirs, quantity))
            if size > GROWTH * most:
                return False
            most = max(most, size)
    return True


def _judge_follower(case: Case, run: Run, expected: Run, rule: Rule) -> Parity | None:
    """Return what `judge_follower` does; fp32 has rules of its own, and so has a lossy hook."""
    if case.job.train.precision == "fp32" or hook_of(case.job, case.strategy) != "none":
        return None
    return judge_follower(run, expected, case.against, rule)


def _judge_with_controls(case: Case, rule: Rule, run: Run, expected: Run) -> Parity | list[Control]:
    """Return the verdict with controls, or those that are missing."""
    wanted, usable = list_controls(case), dict[str, Run]()
    for control in wanted:
        if control.label not in case.known:
            return [control]
        if case.known[control.label].status == "ok":
            usable[control.label] = case.load(control.label)
        if len(usable) < min(NUM_CONTROLS, len(wanted)):
            continue
        verdict = compare_runs(run, expected, case.against, rule, usable)
        if verdict.ok:
            return verdict
        if words := words_needed(run, expected, rule, usable):
            changes = {control.label: control.changes for control in wanted}
            again = [case.control(f"{label}{AGAIN}", **changes[label]) for label in words]
            if missing := [one for one in again if one.label not in case.known]:
                return missing
            repeated = [name for name in words if repeats_its_bits(name, case.known, case.load)]
            verdict = compare_runs(run, expected, case.against, rule, usable, repeated)
            if verdict.ok:
                return verdict
        if differences(run, expected, rule.tolerance, rule.floor)[0].size > LARGEST_KINK:
            return verdict
    return compare_runs(run, expected, case.against, rule, usable)


def _judge_reference(case: Case, rule: Rule, verdict: Parity) -> Parity | list[Control]:
    """Return a verdict once the reference has repeated its bits."""
    trusted = find_trusted(case.root, case.known, case.load, rule)
    if trusted.missing:
        return [case.control(trusted.missing)]
    if trusted.fault and not trusted.label:
        return dataclasses.replace(verdict, ok=False, state="not_decided")
    return verdict
