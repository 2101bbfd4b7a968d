"""One guard, by itself: which losses and norms it holds a fault, and which settings it takes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from hybrid.engines import guard as engines_guard
from hybrid.engines.guard import Guard, Searched
from hybrid.engines.tally import Tally
from hybrid.job.errors import JobError, RunError
from tests.conftest import small_job


def tally(loss: float, count: int = 1) -> Tally:
    made = Tally(torch.device("cpu"))
    made.parts = [(torch.tensor(loss, dtype=torch.float64), count)]
    return made


def verdicts(guard: Guard, losses: list[float], norm: float = 1.0) -> list[bool]:
    found = []
    for step, loss in enumerate(losses):
        guard.fault = None
        found.append(guard.holds(step, [tally(loss)], [norm]))
    return found


def make(precision: str = "fp32", **settings: Any) -> Guard:
    return Guard(small_job(guard=settings, train__precision=precision))


def test_spikes_are_told_by_the_median_of_good_losses() -> None:
    guard = make(spike_factor=3.0, window=3, on_spike="skip")
    assert verdicts(guard, [9.0, 1.0, 2.0, 5.9, 6.1]) == [False] * 4 + [True]
    assert guard.fault and guard.spikes and "3.05 times 2, the median of the last 3" in guard.fault
    assert guard.policy == "skip" and list(guard.losses) == [1.0, 2.0, 5.9]
    again = make(spike_factor=3.0, window=3, on_spike="skip")
    again.set_state(json.loads(json.dumps(guard.state())))
    assert (again.losses, again.in_a_row) == (guard.losses, 1)
    assert verdicts(again, [6.1, 4.0]) == [True, False] and again.in_a_row == 0
    assert verdicts(make(), [1.0] * 30 + [1e30]) == [False] * 31
    with pytest.raises(RunError, match=r"spike_factor = 2: the median of the last 1 losses is -1"):
        verdicts(make(spike_factor=2.0, window=1), [-1.0, -0.5])


def test_bad_steps_in_a_row_end_the_run() -> None:
    guard = make(non_finite="skip", max_in_a_row=3)
    assert verdicts(guard, [math.nan, math.inf, 1.0, math.nan, math.nan]) == [True] * 2 + [
        False,
        True,
        True,
    ]
    assert guard.policy == "skip"
    assert verdicts(guard, [math.nan]) == [True] and guard.policy == "stop"
    assert guard.fault and "guard.max_in_a_row: it is bad step 3 in a row" in guard.fault


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_an_overflow_that_the_loss_scale_handles_is_no_fault(norm: float) -> None:
    assert verdicts(make("fp16"), [1.0], norm) == [False]
    assert verdicts(make("bf16"), [1.0], norm) == [True]
    assert verdicts(make("fp16"), [math.nan], norm) == [True]


def test_every_rank_has_the_verdict_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[1.0, 1.0, 1.0], [math.nan, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

    def ask(gather: Any) -> list[bool]:
        found = []
        for loss, _, norm in rows:
            monkeypatch.setattr(engines_guard, "gather_rows", gather)
            found.append(make().holds(0, [tally(loss)], [norm]))
        return found

    assert ask(lambda row: rows) == [True] * 4
    assert ask(lambda row: [row]) == [False, True, False, False], "a planted fault must show"


def test_a_search_ends_before_the_update() -> None:
    guard = make()
    guard.searching = True
    with pytest.raises(Searched):
        guard.holds(0, [tally(1.0)], [1.0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"spike_factor": 0.5}, r"guard\.spike_factor = 0\.5: valid: 0 \(off\), or a number"),
        ({"non_finite": "ignore"}, r"guard\.non_finite = 'ignore': .*'stop', 'skip' or"),
        ({"windw": 3}, r"guard\.windw: unknown key; did you mean 'window'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        small_job(guard=settings)


def test_settings_without_effect_warn() -> None:
    lines = small_job(guard={"window": 3}).warnings()
    assert lines == ["guard.window has no effect with guard.spike_factor = 0.0"]
