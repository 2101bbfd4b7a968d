"""The headline of every kind of comparison: what it counts, what it names, how grave it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hybrid import report
from hybrid.records import Comparison, Difference, Record, ReferenceFault
from hybrid.report.excuses import LARGE
from hybrid.report.standing import standings
from tests.documents import flat
from tests.reading import TEXT
from tests.test_report import (
    Page,
    break_run,
    console_lines,
    make_comparison,
    make_parity,
    make_run,
)

EIGHT = ("ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d")
FAULT = ReferenceFault(0, "loss", 1e-4, ["single"])


def make_impossible(comparison: Comparison, *names: str) -> Comparison:
    """`comparison` with runs that are not possible here."""
    for name in names:
        comparison = break_run(comparison, Record(name, "not_possible", f"no {name}"), None)
    return comparison


def make_wrong(comparison: Comparison, *names: str, cause: str = "a cause") -> Comparison:
    """`comparison` with runs that leave the reference in one place, each by a value of its own."""
    for n, name in enumerate(names):
        first = Difference(0, "grad_norm", 2.0 + n / 1e6, 0.5, cause)
        comparison = break_run(comparison, make_run(name, 0.2), make_parity(0.2, False, first))
    return comparison


def judge(comparison: Comparison, name: str, state: Any) -> Comparison:
    """`comparison` with another state of one verdict."""
    parity = dataclasses.replace(comparison.parity[name], ok=False, state=state)
    return dataclasses.replace(comparison, parity={**comparison.parity, name: parity}, ok=False)


def lose_reference() -> Comparison:
    """The reference failed, so that the others have nothing to be compared with."""
    comparison = make_comparison("ddp", "fsdp")
    for name in ("single", "ddp", "fsdp"):
        why = "the reference single failed: no memory"
        lost = dataclasses.replace(make_parity(), ok=False, state="not_compared", reason=why)
        comparison = break_run(comparison, comparison.strategies[name], lost)
    run = dataclasses.replace(make_run("single"), status="failed", reason="no memory")
    return break_run(comparison, run, comparison.parity["single"])


@pytest.mark.parametrize(
    ("comparison", "tone", "headline"),
    [
        (make_comparison(*EIGHT), "good", "All 8 strategies equal."),
        (
            make_impossible(make_comparison(*EIGHT[:6]), "pipeline", "2d"),
            "good",
            "All 6 strategies equal, 2 not possible here.",
        ),
        (
            make_wrong(make_comparison(*EIGHT), "zero1", "zero2"),
            "bad",
            "Not equal: zero1, zero2 from step 0 (grad_norm); 6 of 8 strategies equal.",
        ),
        (
            make_impossible(make_wrong(make_comparison("ddp"), "ddp"), "2d"),
            "bad",
            "Not equal: ddp from step 0 (grad_norm), 1 not possible here.",
        ),
        (
            make_wrong(make_comparison("ddp", "fsdp"), "ddp", "fsdp"),
            "bad",
            "Not equal: ddp, fsdp from step 0 (grad_norm); none of 2 strategies equal.",
        ),
        (lose_reference(), "bad", "Not compared: the reference single failed."),
        (
            judge(make_comparison("ddp", "fsdp"), "ddp", "not_compared"),
            "warning",
            "Not compared: ddp; 1 of 2 strategies equal.",
        ),
        (
            judge(make_comparison("ddp", "fsdp"), "ddp", "not_decided"),
            "warning",
            "Not decided: ddp; 1 of 2 strategies equal.",
        ),
        (
            dataclasses.replace(make_comparison(*EIGHT), reference_fault=FAULT),
            "warning",
            "All 8 strategies equal; the reference is not reproducible on this machine.",
        ),
        (
            dataclasses.replace(make_wrong(make_comparison("ddp"), "ddp"), reference_fault=FAULT),
            "bad",
            "Not equal: ddp from step 0 (grad_norm).",
        ),
        (
            make_impossible(make_comparison(), "2d"),
            "good",
            "Nothing compared: only single ran, 1 not possible here.",
        ),
    ],
)
def test_headlines(comparison: Comparison, tone: str, headline: str) -> None:
    said = report.verdict(comparison)
    assert (said.headline, said.tone) == (headline, tone)
    assert f"<header class={tone}>" in report.html(comparison)
    assert flat(" ".join(console_lines(comparison))).startswith(headline)


def test_a_lost_reference_makes_no_run_different() -> None:
    found = standings(lose_reference())
    assert [found[name].state for name in ("single", "ddp", "fsdp")] == [
        "failed",
        "not compared",
        "not compared",
    ]
    text = Page(report.html(lose_reference())).text
    assert "ddp, fsdp were not compared: the reference single failed." in text
    assert text.count("no memory") == 1
    assert "leaves single" not in text and "not equal" not in text


def test_an_emulation_that_failed_is_named() -> None:
    comparison = judge(make_comparison("local_sgd"), "local_sgd", "not_compared")
    lost = Record("local_sgd", "failed", "rank 0 died")
    comparison = dataclasses.replace(comparison, controls={"local_sgd_emulation": lost})
    told = "local_sgd was not compared: its reference local_sgd_emulation failed: rank 0 died."
    assert told in report.verdict(comparison).details


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        (
            FAULT,
            "Of its runs single was off, first at step 0 in loss, by 0.0001 of its value: at s",
        ),
        (
            ReferenceFault(None, "weights of 0.bias", None, ["single", "single_again"]),
            "Of its runs single, single_again were off, first after the last step in weights of "
            "0.bias: later in the run, not at start-up.",
        ),
        (
            ReferenceFault(3, "loss", 1e-3, ["single", "single_again", "single_third"]),
            "No two of its runs single, single_again, single_third agree; they differ first at s",
        ),
        (ReferenceFault(None, "status", None, ["single_off"]), "Of its runs single_off failed."),
        (ReferenceFault(25, "loss", 1e-3, ["a"]), "at step 25 in loss, by 0.001 of its value: lat"),
    ],
)
def test_a_fault_of_the_reference_is_told(fault: ReferenceFault, place: str) -> None:
    comparison = dataclasses.replace(make_comparison("ddp"), reference_fault=fault)
    (told,) = (t for t in report.verdict(comparison).details if "does not repeat" in t)
    assert place in told
    for text in (Page(report.html(comparison)).text, flat(" ".join(console_lines(comparison)))):
        assert "not reproducible on this machine." in text
        assert "The reference single does not repeat its own result." in text
    wrong = dataclasses.replace(make_wrong(comparison, "ddp"), reference_fault=fault)
    assert "Not reproducible on this machine: the reference single" in report.markdown(wrong)


def test_what_went_wrong_alike_is_said_once() -> None:
    comparison = make_wrong(make_comparison("ddp"), "zero1", "zero2", "zero3")
    (told, *_) = report.verdict(comparison).details
    assert told.startswith("zero1, zero2, zero3 leave single at step 0 in grad_norm: got 2, ")
    assert told.endswith("likely cause: a cause (the figures are those of zero1).")
    assert Page(report.html(comparison)).text.count("likely cause") == 1


def test_many_problems_leave_the_costs_in_sight() -> None:
    comparison = make_comparison("ddp")
    for n, name in enumerate(EIGHT[1:]):
        run = dataclasses.replace(make_run(name), status="failed", reason=f"reason {n}")
        comparison = break_run(comparison, run, None)
    said = report.verdict(comparison)
    assert [f"reason {n}" in " ".join(said.details) for n in range(7)] == [True] * 3 + [False] * 4
    assert "Below the table: 4 further problems." in said.details
    text = Page(report.html(comparison)).text
    assert [text.count(f"reason {n}") for n in range(7)] == [1] * 7
    assert text.index("speedup") < text.index("reason 3")


def test_a_long_reason_is_whole_with_the_receipt() -> None:
    reason = "word " * 200 + "end of it"
    run = dataclasses.replace(make_run("zero3"), status="failed", reason=reason)
    comparison = break_run(make_comparison("ddp"), run, None)
    assert "end of it" not in " ".join(report.verdict(comparison).details)
    assert "end of it" in Page(report.html(comparison)).text


def excuse(comparison: Comparison, name: str, weights: float, **entry: Any) -> Comparison:
    """`comparison` in which controls excused one difference of a run."""
    parity = dataclasses.replace(
        comparison.parity[name], max_weight_diff=weights, excused=[{"control": 0.31, **entry}]
    )
    return dataclasses.replace(comparison, parity={**comparison.parity, name: parity})


def test_a_large_difference_has_its_reason_beside_it() -> None:
    place = {"step": None, "quantity": "weights of 1.bias", "difference": 0.25}
    comparison = excuse(make_comparison("ddp", "fsdp"), "ddp", 0.25, **place)
    reason = "(ddp, weights of 1.bias: excused, since rounding moves this by 0.31)"
    for text in (report.markdown(comparison), Page(report.html(comparison)).text):
        assert f"0.25 in the weights {reason}" in text
        assert "0.25 (rounding 0.31)" in text
        assert "Rounding: how far rounding alone moves it" in text
    wide = dataclasses.replace(make_parity(), tolerance={"loss": 1e-3, "weights": 0.25})
    wide = dataclasses.replace(wide, max_weight_diff=0.2)
    bf16 = dataclasses.replace(make_comparison("ddp"), parity={"ddp": wide})
    assert "| 1e-7 | 0.2 (allowed 0.25) |" in report.markdown(bf16)
    assert "0.2 in the weights (allowed 0.25)." in report.markdown(bf16)
    assert "(" not in report.verdict(make_comparison("ddp")).details[0]


@pytest.mark.parametrize("kink", [True, False])
def test_a_kink_is_called_a_kink(kink: bool) -> None:
    place = {"step": 25, "quantity": "grad_norm", "difference": 1e-2}
    comparison = excuse(make_comparison("ddp", "fsdp"), "ddp", 1e-7, kink=kink, **place)
    text = report.markdown(comparison)
    assert ("A kink at step 25: the grad_norm of ddp leaves the reference within" in text) is kink
    assert "exceeded the tolerance at 1 place, excused" in text


def test_controls_that_excuse_nothing_are_named() -> None:
    parity = dataclasses.replace(make_parity(), refused=["single_cut_3"])
    comparison = dataclasses.replace(make_comparison("ddp"), parity={"ddp": parity})
    assert "single_cut_3: this control left the reference in steps" in report.markdown(comparison)


def test_equal_at_the_proxy_size_is_never_plainly_equal() -> None:
    by_proxy = dataclasses.replace(make_parity(), reference="proxy")
    made = make_comparison("ddp", "fsdp")
    runs = {name: run for name, run in made.strategies.items() if name != "single"}
    parity = dict.fromkeys(runs, by_proxy)
    comparison = dataclasses.replace(made, reference="proxy", strategies=runs, parity=parity)
    said = report.verdict(comparison)
    assert (said.headline, said.tone) == ("Both strategies equal at the proxy size.", "good")
    assert "1e-7 in the loss, 2e-7 in the weights, at the proxy size." in said.details[-1]
    text = report.markdown(comparison)
    assert text.count("| equal at the proxy size | 7,777 |") == 2
    assert "| equal |" not in text and "Both strategies equal at" in report.html(comparison)


def test_what_was_interrupted_is_not_compared() -> None:
    comparison = make_comparison("ddp")
    for name in ("fsdp", "zero1"):
        comparison = break_run(comparison, Record(name, "failed", "interrupted"), None)
    said = report.verdict(comparison)
    assert (said.ok, said.tone) == (False, "warning")
    assert said.headline == "Not compared: fsdp, zero1; 1 of 3 strategies equal."
    assert said.details[0] == "fsdp, zero1 were not compared: interrupted."


def test_a_reason_that_was_recorded_is_told() -> None:
    comparison = judge(make_comparison("ddp", "fsdp"), "ddp", "not_compared")
    parity = dataclasses.replace(comparison.parity["ddp"], reason="interrupted")
    comparison = dataclasses.replace(comparison, parity={**comparison.parity, "ddp": parity})
    assert report.verdict(comparison).details[0] == "ddp was not compared: interrupted."


def test_a_variant_says_what_it_is() -> None:
    run = dataclasses.replace(make_run("keep"), variant_of="fsdp")
    comparison = break_run(make_comparison("fsdp"), run, make_parity())
    section = {"keep": {"strategy": "fsdp", "reshard_after_forward": False}}
    comparison = dataclasses.replace(comparison, job={**comparison.job, "variant": section})
    assert "keep is fsdp with reshard_after_forward no." in report.verdict(comparison).notes


def test_the_document_has_this_number() -> None:
    assert LARGE == 1e-3
    assert "over 1e-3 that a tolerance allows has that tolerance beside it" in flat(TEXT)
