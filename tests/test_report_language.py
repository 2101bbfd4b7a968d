"""The report on language models: tokens and perplexity, precision ledgers, validation, skipped and
excused steps. Costs stay with the runs that were proved equal."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from hybrid import report
from hybrid.records import Comparison, Difference, EvalResult, Memory, Receipt, Record, StepEval
from hybrid.records import Throughput as Pace
from hybrid.report.costs import format_pace
from hybrid.report.formats import DASH, format_perplexity
from hybrid.report.plots import bars, curves
from hybrid.report.precision import compare_precision
from tests.test_report import (
    Page,
    break_run,
    console_lines,
    difference_plot,
    make_comparison,
    make_parity,
    make_run,
    table_rows,
)

KINDS = ("computing", "activations", "stored", "gradients", "master_weights", "optimizer_state")
FP32 = dict.fromkeys((*KINDS, "buffers"), "fp32")
BF16 = {**FP32, "computing": "bf16", "activations": "bf16"}
BESIDE = {**BF16, "stored": "bf16"}  # as DeepSpeed does it
TESTED = {0: 60.3, 10: 12.0, 30: 5.2069}  # perplexity after so many steps
MIB = 2**20


def make_language_run(name: str, **changes: Any) -> Record:
    """A run of a language model in fp32, each figure unlike any other."""
    tested = {n: EvalResult(p / 10, 64, 100, 0.1, None, p, 1024) for n, p in TESTED.items()}
    run = dataclasses.replace(
        make_run(name),
        receipt=Receipt(True, {"precision": FP32}),
        eval=tested[30],
        evals=[StepEval(n, result) for n, result in tested.items()],
        throughput=Pace(111.0, 0.5, 0.5, 20, 4321.0),
        memory=Memory([12 * MIB, 11 * MIB], "live storages", [9 * MIB, 8 * MIB]),
    )
    return dataclasses.replace(run, **changes)


def make_language(**changes: dict[str, Any]) -> Comparison:
    """`single`, and runs equal to it, with what is changed in each."""
    names = ("single", *(name for name in changes if name != "single"))
    runs = {name: make_language_run(name, **changes.get(name, {})) for name in names}
    return dataclasses.replace(make_comparison(*names[1:]), strategies=runs)


def with_ledgers(**ledgers: dict[str, str]) -> Comparison:
    receipts = {name: Receipt(True, {"precision": own}) for name, own in ledgers.items()}
    return make_language(**{name: {"receipt": receipt} for name, receipt in receipts.items()})


def spoil(comparison: Comparison, name: str) -> Comparison:
    """`comparison` with a run that is not equal any more."""
    first = Difference(10, "loss", 1.5, 1.25)
    return break_run(comparison, comparison.strategies[name], make_parity(0.2, False, first))


def row_of(comparison: Comparison, name: str) -> dict[str, str]:
    header, _, *rows = table_rows(report.markdown(comparison))
    return dict(zip(header, next(row for row in rows if row[0] == name), strict=True))


def test_columns_of_a_language_model() -> None:
    comparison = make_language(ddp={})
    row = row_of(comparison, "ddp")
    assert (row["test result"], row["tokens/s"]) == ("ppl 5.21", "4,321")
    assert row["peak memory"] == "9.00 MiB"
    text = report.markdown(comparison)
    assert "perplexity (ppl), e to the mean loss of a target" in text
    assert "Peak memory: in the first training steps; building the engine is left out." in text
    page = Page(report.html(comparison)).text
    assert "from building the engine on(12.0 MiB, 11.0 MiB)" in page
    titles = [drawn.title for drawn in bars(comparison)]
    assert titles == ["Tokens per second", "Peak memory", "Bytes sent a step"]
    drawn = [chart.rows["ddp"] for chart in bars(comparison)][:2]
    assert [row.text for row in drawn] == ["4,321", "9.00 MiB"]
    assert [row.lines[0][0][1] for row in drawn] == [4321, 9 * MIB]
    assert any("tokens/s" in line for line in console_lines(comparison))


def test_a_column_means_the_same_in_each_row() -> None:
    old = {"throughput": Pace(222.0, 0.5, 0.5, 20), "memory": Memory([7 * MIB], "live storages")}
    comparison = make_language(ddp={}, fsdp=old)
    rows = [row_of(comparison, name) for name in ("ddp", "fsdp")]
    assert [row["samples/s"] for row in rows] == ["111", "222"]
    assert [row["peak memory"] for row in rows] == ["12.0 MiB", "7.00 MiB"]
    assert "building the engine is part of it" in report.markdown(comparison)


def test_figures_that_grow_stay_short() -> None:
    assert format_pace(Pace(10.0, 0.1, 0.2, 20, 1000.0), unit="tokens") == "1,000 (mean 500)"
    sizes = (1.5, 50257.3, 1e6, 1e304)
    assert [format_perplexity(s) for s in sizes] == ["1.50", "50,257", "1.00e+06", "1.00e+304"]


def test_accuracy_stays_where_there_is_no_perplexity() -> None:
    assert row_of(make_comparison("ddp"), "ddp")["test result"] == "95.10%"
    assert "perplexity" not in report.markdown(make_comparison("ddp"))


def test_one_precision_for_all_is_one_sentence() -> None:
    comparison = with_ledgers(ddp={**FP32, "buffers": "none"})
    found = compare_precision(comparison)
    assert found and found.sentences == ["single, ddp held and computed everything in fp32."]
    assert "single, ddp held and computed everything in fp32." in Page(report.html(comparison)).text
    assert "class=ledgers" not in report.html(comparison)


def test_ledgers_are_marked_where_they_differ() -> None:
    comparison = with_ledgers(single=BF16, fsdp=BF16, zero1=BESIDE, zero3=BESIDE)
    page, found = report.html(comparison), compare_precision(comparison)
    assert found and found.headers[1:] == [k.replace("_", " ") for k in (*KINDS, "buffers")]
    same = ["bf16", "bf16", "fp32", "fp32", "fp32", "fp32", "fp32"]
    for name, texts in (("single", same), ("zero1", [*same[:2], "bf16", *same[3:]])):
        assert [cell.text for cell in found.rows[name]] == texts
    assert [cell.differs for cell in found.rows["zero3"]] == [n == 2 for n in range(7)]
    shown = Page(page).text
    assert "Stored in bf16 under zero1, zero3 (single: fp32): parameters rounded once" in shown
    assert "beside their fp32 master weights" in shown
    assert page.count("<td class=differs>bf16</td>") == 2
    alike = compare_precision(with_ledgers(single=BF16, fsdp=BF16))
    assert alike and "No run differs from single." in alike.sentences and len(alike.rows) == 2


def test_every_difference_is_told() -> None:
    other = {**BF16, "reductions": "bf16", "buffers": "bf16", "scales": "fp32"}
    comparison = with_ledgers(single={**BF16, "reductions": "fp32", "scales": "fp64"}, ddp=other)
    found = compare_precision(comparison)
    assert found and found.headers[-2:] == ["buffers", "scales"]
    told = [sentence.split(":")[0] for sentence in found.sentences[1:]]
    kinds = ("Reductions in bf16", "Buffers in bf16", "Scales in fp32")
    assert told == [f"{kind} under ddp (single" for kind in kinds]


def test_nothing_of_a_kind_is_no_difference() -> None:
    found = compare_precision(with_ledgers(single=BF16, pipeline={**BF16, "buffers": "none"}))
    assert found and not any(cell.differs for cell in found.rows["pipeline"])
    assert found.sentences[-1] == '"none": this rank has nothing of the kind.'


def test_ledgers_without_a_reference_are_shown() -> None:
    comparison = make_language(single={"receipt": None}, ddp={})
    found = compare_precision(comparison)
    assert found and found.sentences[1] == "single left no ledger to compare with."
    assert set(found.rows) == {"ddp"}
    assert compare_precision(make_comparison("ddp")) is None
    assert "Precision" not in Page(report.html(make_comparison("ddp"))).text


def test_validation_from_first_to_last() -> None:
    comparison = make_language(ddp={}, zero1={})
    told = "6.0300 -> 0.52069, perplexity 60.3 -> 5.21, after 0 and 30 steps."
    for text in (report.markdown(comparison).replace("\\", ""), Page(report.html(comparison)).text):
        assert text.count(f"Validation loss of single, ddp, zero1: {told}") == 1
    drawn = next(c for c in curves(comparison) if c.title == "Validation loss")
    assert [trace["x"] for trace in drawn.figure["data"]] == [[0, 10, 30]] * 3
    assert "Validation loss" in report.html(comparison)
    once = make_language(single={"evals": []}, ddp={"evals": make_language_run("ddp").evals[-1:]})
    assert "alidation loss" not in report.markdown(once) + Page(report.html(once)).text


def test_no_cost_and_no_progress_of_a_run_that_is_not_equal() -> None:
    comparison = spoil(make_language(ddp={}, zero1={}), "zero1")
    row, text = row_of(comparison, "zero1"), report.markdown(comparison)
    assert [row[c] for c in ("tokens/s", "speedup", "peak memory", "bytes sent")] == [DASH] * 4
    assert "Validation loss of single, ddp:" in text
    fold = report.html(comparison).split("<summary>zero1: not equal</summary>")[1]
    assert "MiB" not in fold.split("<summary>")[1]
    drawn = next(c for c in curves(comparison) if c.title == "Validation loss")
    assert drawn.figure["data"][-1]["name"] == "zero1 (not equal)"


def test_skipped_steps_are_counted() -> None:
    steps = make_run("single").steps
    skipped = [
        dataclasses.replace(s, grad_norm=None, skipped=True, loss_scale=2.0**16) for s in steps[:2]
    ]
    comparison = make_language(single={"steps": skipped + steps[2:]}, ddp={})
    said = "Steps skipped, since gradients overflowed in fp16: 2 of 30 under single; 0 of 30 under"
    assert said in report.markdown(comparison)
    assert said in Page(report.html(comparison)).text
    assert "skipped" not in report.markdown(make_language(ddp={}))


def make_excused(**places: list[dict[str, Any]]) -> Comparison:
    comparison = make_comparison(*places)
    parity = {n: dataclasses.replace(make_parity(), excused=found) for n, found in places.items()}
    return dataclasses.replace(comparison, parity=parity)


def found_at(step: int | None, quantity: str, difference: float) -> dict[str, Any]:
    return {"step": step, "quantity": quantity, "difference": difference, "control": 9.9e-5}


def test_what_was_excused_is_one_sentence() -> None:
    late, end = found_at(25, "loss", 3e-6), found_at(None, "weights of 2.up.weight", 6.18e-5)
    comparison = make_excused(ddp=[end], fsdp=[end], zero1=[])
    text = report.markdown(comparison)
    assert text.count("exceeded the tolerance") == 1
    assert "ddp, fsdp exceeded the tolerance at 1 place each, excused since rounding" in text
    tail = "the greatest: weights of 2.up.weight at the end, difference 6.2e-5, control 9.9e-5."
    assert tail in text
    assert "fsdp exceeded the tolerance at 1 to 2 places each" in report.markdown(
        make_excused(ddp=[end], fsdp=[late, end])
    )
    only = make_excused(ddp=[late, end])
    assert "ddp exceeded the tolerance at 2 places, excused" in report.markdown(only)
    page = Page(report.html(only)).text
    assert "loss at step 25, difference 3e-6, control 9.9e-5" in page
    assert not re.search("step none|at none", page + report.markdown(only), re.IGNORECASE)


@pytest.mark.parametrize(("quantity", "large"), [("loss", [25]), ("grad_norm", list(range(30)))])
def test_steps_excused_in_the_loss_are_large_dots(quantity: str, large: list[int]) -> None:
    comparison = make_excused(ddp=[found_at(25, quantity, 3e-6)])
    sizes = difference_plot(comparison).figure["data"][0]["marker"]["size"]
    assert [step for step, size in enumerate(sizes) if size == max(sizes)] == large
