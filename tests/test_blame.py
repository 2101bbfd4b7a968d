"""The rank that the others wait for is found by what all ranks say of themselves."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybrid.launch import blocking_calls, stall
from hybrid.launch import waiting as waiting_module
from hybrid.launch.blame import (
    ENDED,
    FAILED,
    Sign,
    find_cause,
    silent_rank,
    stuck_rank,
    unlike_rank,
)
from hybrid.launch.stall import StallWatch
from hybrid.launch.waiting import (
    enter,
    leave,
    num_waits,
    stand_aside,
    thread_waits,
    waiting,
    waits_for,
)

WAITS = Sign(beat=9, where="in step 5", line="engine.py:7", waits="a collective", step=5, begun=40)
SEEDS = range(8)


def signs(seed: int, **guilty: Any) -> tuple[list[Sign], int, int]:
    """What four ranks say, of which a drawn one differs; it, and another one that asks."""
    rank, asks = random.Random(seed).sample(range(4), 2)
    found = [WAITS] * 4
    found[rank] = dataclasses.replace(WAITS, **guilty)
    return found, rank, asks


@pytest.mark.parametrize("seed", SEEDS)
def test_who_does_not_wait_is_named_and_never_one_that_waits(seed: int) -> None:
    found, rank, asks = signs(seed, waits="", line="my_model.py:12")
    assert stuck_rank(found, asks) == (rank, "it did not join the others, and is at my_model.py:12")
    assert stuck_rank([WAITS] * 4, asks) is None, "all wait alike"


@pytest.mark.parametrize("seed", SEEDS)
def test_of_several_that_do_not_say_that_they_wait_the_one_behind_is_named(seed: int) -> None:
    """Such as in a wait inside C++: they have begun what the rank behind has not."""
    for behind in ({"begun": 39}, {"step": 4, "begun": 90}):
        found, rank, asks = signs(seed, **behind)
        found = [dataclasses.replace(sign, waits="") for sign in found]
        told = stuck_rank(found, asks)
        assert told is not None and told[0] == rank


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_left_is_no_rank_without_signs(seed: int) -> None:
    before, rank, asks = signs(seed)
    failed = [dataclasses.replace(sign, left=FAILED) for sign in before]
    assert silent_rank(failed, failed, asks) is None
    now = [dataclasses.replace(sign, beat=12) for sign in before]
    now[rank] = before[rank]
    gone = next(r for r in range(4) if r not in (rank, asks))
    now[gone] = dataclasses.replace(before[gone], left=FAILED)
    cause = find_cause(before, now, asks)
    assert cause is not None and cause.rank == rank and "no sign of life" in cause.message


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_that_ended_while_others_waited_is_named(seed: int) -> None:
    found, rank, asks = signs(seed, left=ENDED)
    assert stuck_rank(found, asks) == (rank, "it had ended while others still waited for it")


@pytest.mark.parametrize("seed", SEEDS)
def test_where_all_wait_the_odd_one_is_named(seed: int) -> None:
    """As after a collective that one rank skipped; it may be the one that asks."""
    for odd in ({"line": "other.py:3"}, {"step": 4}):
        found, rank, asks = signs(seed, **odd)
        for who in (rank, asks):
            told = stuck_rank(found, who)
            assert told is not None and told[0] == rank
    assert unlike_rank({0: "a", 1: "b", 2: "a", 3: "b"}) is None, "nobody stands out"
    assert unlike_rank({0: "a", 1: "b"}) is None


def test_a_wait_that_begins_in_another_thread_ends_where_it_belongs() -> None:
    """As on a GPU, where the callback that begins it runs in a thread of the device."""
    begin = threading.Thread(target=enter, args=("a reduction", threading.get_ident()))
    begin.start()
    begin.join()
    assert waits_for() == "a reduction"
    leave()
    assert waits_for() == ""
    with waiting("a step"):
        assert waits_for() == "a step"


def test_a_wait_is_the_ranks_unless_its_thread_stands_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting_module, "_threads", {})
    before = num_waits()
    with waiting("a step"), waiting("a collective in it"):
        assert waits_for() == "a step" and num_waits() == before + 1
    assert waits_for() == ""
    inside, stay = threading.Event(), threading.Event()

    def save(aside: bool) -> None:
        if aside:
            stand_aside()
        with waiting("a checkpoint"):
            inside.set()
            stay.wait()

    for aside in (True, False):
        inside.clear(), stay.clear()
        thread = threading.Thread(target=save, args=(aside,))
        thread.start()
        inside.wait()
        assert waits_for() == ("" if aside else "a checkpoint") and thread_waits(thread)
        stay.set()
        thread.join()
        assert waits_for() == "" and not thread_waits(thread)
        monkeypatch.setattr(waiting_module, "_threads", {})


def test_a_wait_costs_a_few_microseconds() -> None:
    started = time.thread_time()
    for _ in range(10_000):
        enter("x")
        leave()
    assert (time.thread_time() - started) / 10_000 < 5e-6


def test_calls_of_torch_say_that_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    c10d: Any = torch._C._distributed_c10d
    monkeypatch.setattr(c10d.Work, "wait", lambda work: seen.append(waits_for()))
    monkeypatch.setattr(dist, "_broadcast_coalesced", lambda *_: seen.append(waits_for()))
    blocking_calls.mark()
    c10d.Work.wait(None)
    dist._broadcast_coalesced(None)  # type: ignore[attr-defined, call-arg]
    blocking_calls.unmark()
    c10d.Work.wait(None)
    assert seen[0] and seen[1] and not seen[2] and waits_for() == ""


def test_the_end_of_a_backward_pass_waits_and_not_what_it_computes() -> None:
    seen: list[str] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            seen.append(waits_for())
            # As DDP does with its last bucket: it runs at the end of the pass.
            torch.autograd.Variable._execution_engine.queue_callback(
                lambda: seen.append(waits_for())
            )
            return gradient

    loss = Look.apply(torch.ones(3, requires_grad=True)).sum()
    with blocking_calls.reducing(loss):
        loss.backward()
    assert seen == ["", "the reduction of gradients"] and waits_for() == ""


def test_a_verdict_is_formed_while_ranks_wait_and_taken_back_by_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's watchdog ends a process without a word: then it is too late to ask."""
    clock = [100.0]
    monkeypatch.setattr(stall.time, "monotonic", lambda: clock[0])
    file = tmp_path / "rank1.waits.json"
    watch, asked = StallWatch(1, 2.0, file), [0]

    def say() -> Sequence[Sign]:
        asked[0] += 1
        return [
            dataclasses.replace(WAITS, beat=asked[0], waits="" if r == 3 else "x") for r in range(4)
        ]

    for seconds, expected in ((0, 0), (1.5, 0), (2, 1), (3, 1), (5.5, 2), (9, 2)):
        clock[0] = 100 + seconds
        watch.look("in step 5", say)
        assert asked[0] == expected, "it looks twice, and not before it has waited"
    assert watch.verdict is not None and watch.verdict.rank == 3 and file.exists()
    watch.look("in step 6", say)
    assert watch.verdict is None and not file.exists()
