"""The page's table of likely causes is what the code says."""

from __future__ import annotations

import ast
import dataclasses
import re

from hybrid.comparison.causes import Facts
from hybrid.comparison.differences import Run
from hybrid.comparison.doubts import name_suspect
from hybrid.comparison.parity import compare_runs
from hybrid.records import ResumedFrom, Weights
from tests import test_parity as made
from tests.documents import rows
from tests.reading import PARITY, section, strings


def first_updates(**factors: float) -> Run:
    """A run that leaves its reference after the first step, with updates off by tensor."""
    off = {n: by for n in made.NAMES for start, by in factors.items() if n.startswith(start[1:])}
    steps = made.at_steps(range(1, made.STEPS), loss=1.1).record.steps
    return made.make_run(weights=made.make_weights(off), steps=steps)


def plain_runs() -> list[Run]:
    """Runs that are wrong in one way each, which their first difference shows."""
    other = Weights({**made.START, "2.bias": 7.0}, made.make_weights().after_first_step)
    every = range(made.STEPS)
    return [
        made.make_run(weights=other),
        made.at_steps([5], samples=2),
        made.at_steps([5], lr=2.0),
        *(made.at_steps(every, grad_norm=by) for by in (2.0, 3.0, 6.0, 1 / 2, 1 / 3)),
        first_updates(_=10.0),
        *(first_updates(_2=10.0, _3=by) for by in (10.0, 5.0)),
        *(first_updates(_1=10.0, _2=by) for by in (10.0, 5.0)),
    ]


def causes() -> list[str]:
    """What the code says of runs that are wrong in every way it knows."""
    found = [made.first(run)[2] for run in plain_runs()]
    wrong, right = made.at_steps(range(30, made.STEPS), loss=1.001), made.make_run()
    parity = made.verdict(right, right, right, right, reference=wrong)
    pair = dict.fromkeys(("ddp", "pipeline"), made.verdict(right, reference=wrong))
    suspect = name_suspect(pair, "single", str, lambda name: right, made.rule())
    found += [
        p.first_difference.likely_cause for p in (parity, suspect["ddp"]) if p.first_difference
    ]
    found.append(made.first(made.with_weights("1.bias", 2.0))[2])
    found.append(made.first(made.at_steps(range(made.STEPS), loss=2.0, grad_norm=2.0))[2])
    found.append(made.first(with_still_bias())[2])
    steps = [
        dataclasses.replace(step, grad_norm=1.5 + 0.1 * min(n, 5))
        for n, step in enumerate(right.record.steps)
    ]
    found.append(made.first(made.make_run(steps=steps))[2])
    late = made.at_steps(range(4, made.STEPS), loss=1.01)
    source = ResumedFrom("step-00000004", 4, "")
    resumed = dataclasses.replace(
        late, record=dataclasses.replace(late.record, resumed_from=source)
    )
    found.append(made.first(resumed)[2])
    for clip_norm, ratio in ((1.0, 1.25), (0.0, 1 / 1.5)):
        run, facts = first_updates(_=ratio), Facts(clip_norm=clip_norm)
        rule = dataclasses.replace(made.rule(), facts=facts)
        clipped = compare_runs(run, made.make_run(), "single", rule).first_difference
        found.append(clipped and clipped.likely_cause)
    return [str(cause) for cause in found]


def with_still_bias() -> Run:
    """A run whose first step does not move one bias."""
    after = {**made.make_weights().after_first_step, "1.bias": made.START["1.bias"]}
    steps = made.at_steps(range(1, made.STEPS), loss=1.1).record.steps
    return made.make_run(weights=Weights(made.START, after), steps=steps)


def test_likely_causes_are_those_that_the_code_names() -> None:
    templates = [row[0].strip("`") for row in rows(section("Likely causes"))[1:]]
    patterns = [re.sub(r"\b(N|NAME|NAMES|LAYERS|HOW)\b", ".+", re.escape(t)) for t in templates]
    used = set()
    for cause in causes():
        matches = {n for n, pattern in enumerate(patterns) if re.fullmatch(pattern, cause)}
        assert len(matches) == 1, cause
        used |= matches
    assert used == set(range(len(templates)))


def test_every_word_of_a_likely_cause_is_explained() -> None:
    text = section("Likely causes")
    said: set[str] = set()
    for node in PARITY.body:
        returns = node.returns if isinstance(node, ast.FunctionDef) else None
        if returns and ast.unparse(returns) == "str | None":
            said |= {s.strip() for s in strings(node) if " " in s}
    assert len(said) > 15
    assert not {s for s in said if s not in text} - {"weights of", "x"}  # a quantity, "A x B"
