"""Costs come first below the verdict: who costs least, by how much, and what that is worth."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import pytest
from rich.console import Console

from hybrid import report
from hybrid.comparison.best import find_best
from hybrid.records import Best, Comm, Comparison, Memory, Receipt, Record
from hybrid.records import Throughput as Pace
from hybrid.report.formats import count, format_ratio, join_words
from hybrid.report.overview import tell_tool
from hybrid.report.plots import COLOURS, GREY, bars, curves
from tests.test_report import Page, break_run, console_lines, make_comparison, make_parity, make_run
from tests.test_report_verdict import EIGHT, make_wrong

MIB = 2**20
MACHINE = {
    "cores": 2,
    "processor": "a processor",
    "date": "2026-11-26T10:50:12+00:00",
    "packages": {"hybrid": "1.2.3", "torch": "2.13.0", "deepspeed": None},
}


def make_costs(name: str, speed: float, peak: int, sent: float, ranks: int = 4) -> Record:
    return dataclasses.replace(
        make_run(name),
        world_size=ranks,
        receipt=Receipt(True, {"elements_total": 567434}),
        throughput=Pace(speed, 1 / speed, 1 / speed, 20),
        memory=Memory([peak * MIB, MIB], "live storages"),
        comm=Comm([sent, 0.0], {"all_reduce": {"sent_bytes": [sent, 0.0]}}, 1),
    )


def make_ranked(**changes: Any) -> Comparison:
    """Four runs, each of the parallel ones best at one thing, and one that is wrong."""
    runs = [
        make_costs("single", 1000.0, 8, 0.0, ranks=1),
        make_costs("ddp", 2000.0, 9, 3 * MIB),
        make_costs("fsdp", 500.0, 2, 9 * MIB),
        make_costs("pipeline", 700.0, 7, 0.3 * MIB),
        make_costs("zero1", 9000.0, 1, 1.0),
    ]
    comparison = make_wrong(make_comparison(*(run.strategy for run in runs[1:])), "zero1")
    strategies = {run.strategy: run for run in runs}
    parity = {"single": make_parity(0.0), **comparison.parity}
    best = find_best(strategies, parity)
    found = dataclasses.replace(comparison, strategies=strategies, parity=parity, best=best)
    return dataclasses.replace(found, machine=MACHINE, **changes)


def test_the_best_are_found_among_equal_runs_alone() -> None:
    assert make_ranked().best == Best("ddp", "fsdp", "pipeline")
    found = make_ranked()
    unproved = dataclasses.replace(found.strategies["ddp"], receipt=Receipt(False, {}))
    runs = {**found.strategies, "ddp": unproved}
    assert find_best(runs, found.parity).fastest == "single"
    assert find_best(runs, {}) == Best()


def test_ranks_compare_what_the_table_shows() -> None:
    """Of memory the peak in the steps, where all runs have that: not the one while building."""
    found, built = make_ranked(), Memory([1 * MIB], "live storages", [9 * MIB])
    runs = {n: dataclasses.replace(r, memory=built) for n, r in found.strategies.items()}
    low = Memory([99 * MIB], "live storages", [3 * MIB])
    runs["pipeline"] = dataclasses.replace(runs["pipeline"], memory=low)
    assert find_best(runs, found.parity).least_memory == "pipeline"


def test_one_line_says_who_costs_least_with_ratios() -> None:
    line = "Fastest: ddp (2,000 samples/s, 2.00x single). "
    line += "Least memory: fsdp (2.00 MiB, 0.25x single). "
    line += "Fewest bytes sent: pipeline (307 KiB a step)."
    comparison = make_ranked()
    assert line in report.markdown(comparison).splitlines()[2]
    assert line in " ".join(" ".join(console_lines(comparison)).split())
    page = report.html(comparison)
    assert (
        page.index("(2,000 samples/s, 2.00x single)")
        < page.index("<table")
        < page.index("<figure>")
    )


def test_a_reference_that_costs_least_is_followed_by_the_next() -> None:
    comparison = make_ranked(best=Best("single", "single", None))
    text = report.markdown(comparison)
    assert "Fastest: single (1,000 samples/s), then ddp (2,000 samples/s, 2.00x single)." in text
    assert "Least memory: single (8.00 MiB), then fsdp (2.00 MiB, 0.25x single)." in text
    assert "Fewest bytes" not in text


def test_nothing_measured_says_nothing() -> None:
    comparison = make_comparison("ddp")
    assert "Fastest" not in report.markdown(comparison) + Page(report.html(comparison)).text


@pytest.mark.parametrize(("cores", "told"), [(2, True), (4, False), (None, False)])
def test_processes_that_share_cores_are_named(cores: int | None, told: bool) -> None:
    comparison = make_ranked(reference_fault=None)
    comparison = dataclasses.replace(comparison, machine={**MACHINE, "cores": cores})
    texts = [report.markdown(comparison), Page(report.html(comparison)).text]
    texts.append(" ".join(console_lines(comparison)))
    assert [text.count("4 processes shared") for text in texts] == [int(told)] * 3
    lost = dataclasses.replace(comparison.strategies["single"], status="failed", reason="no")
    none = dataclasses.replace(break_run(comparison, lost, None), parity={})
    assert report.markdown(none).count("4 processes shared 2 cores.") == int(told)


def test_speedup_is_over_the_reference() -> None:
    rows = report.markdown(make_ranked()).splitlines()
    cells = {r.split("|")[1].strip(): r.split("|")[4].strip() for r in rows if r.startswith("|")}
    assert [cells[name] for name in ("strategy", "single", "ddp", "fsdp", "zero1")] == [
        *("speedup", "1.00x", "2.00x", "0.5x", "\N{EM DASH}"),
    ]
    lost = dataclasses.replace(make_ranked().strategies["single"], throughput=None)
    text = report.markdown(break_run(make_ranked(), lost, make_parity()))
    assert not re.search(r"\dx \|", text) and "samples/s, " not in text


def test_page_says_what_ran_where_and_when() -> None:
    texts = [report.markdown(make_ranked()), Page(report.html(make_ranked())).text]
    for text in texts:
        assert "model (567,434 parameters) on data, optimizer, global batch 100, fp32, " in text
        assert "30 optimizer steps; single on 1 process, the others on 4." in text
        assert "hybrid 1.2.3, 2026-11-26, 2 cores of a processor, torch 2.13.0." in text
    assert tell_tool(make_comparison("ddp")) == "hybrid."


def test_markdown_is_as_short_as_the_top_of_the_page() -> None:
    comparison = make_ranked()
    text = report.markdown(comparison)
    assert len(text.splitlines()) < 20 + len(comparison.strategies) and "##" not in text


def test_no_sentence_is_said_twice() -> None:
    comparison = make_ranked()
    seen = Page(report.html(comparison).split("<body>")[1]).text  # the title is the headline
    for text in (seen, report.markdown(comparison)):
        sentences = [s.strip() for s in re.split(r"(?<=[.:])\s+|\n", text)]
        long = [s for s in sentences if len(s) > 30 and " " in s]
        assert len(long) > 5
        assert sorted(long) == sorted(set(long))


def hue(colour: str) -> str:
    """The family of a colour, where it is one that only a verdict may have."""
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    if red > 1.7 * max(green, blue):
        return "red"
    return "green" if green > 1.2 * max(red, blue) else ""


def test_red_and_green_are_the_verdict_s_alone() -> None:
    assert (hue("#d6453d"), hue("#0f9d76"), hue("#116329")) == ("red", "green", "green")
    assert not [c for c in (*COLOURS.values(), GREY) if hue(c)]
    assert len({*COLOURS.values(), GREY}) == len(EIGHT) + 1
    drawn = str([chart.figure for chart in curves(make_ranked())])
    assert not [c for c in re.findall(r"#[0-9a-f]{6}", drawn) if hue(c)]
    own = re.sub(r"<script[^>]*>.*?</script>", "", report.html(make_ranked()), flags=re.DOTALL)
    assert "background:" not in own.split("</style>")[1]


def test_a_run_has_one_colour_in_every_plot() -> None:
    comparison = make_comparison("fsdp", "my_variant", "ddp", "other")
    found: dict[str, set[str]] = {}
    for drawn in curves(comparison):
        for trace in drawn.figure["data"]:
            found.setdefault(trace["name"], set()).add(trace["marker"]["color"])
    assert found["fsdp"] == {COLOURS["fsdp"]} and found["ddp"] == {COLOURS["ddp"]}
    assert [len(colours) for colours in found.values()] == [1] * 5
    assert len(set.union(*found.values())) == 5


def test_bytes_are_told_in_parts() -> None:
    sent = {"send": [10.0, 2048.0], "all_gather": [0.0, 4096.0], "recv": [0.0, 0.0]}
    sent["broadcast"] = [0.0, 8.0]
    by = {op: {"sent_bytes": sizes} for op, sizes in sent.items()}
    run = dataclasses.replace(make_run("ddp"), comm=Comm([10.0, 6144.0], by, 1))
    chart = bars(break_run(make_comparison("ddp"), run, make_parity()))[2]
    assert chart.rows["ddp"].parts == "all_gather 4.00 KiB, send 2.00 KiB"
    assert [length for _, length in chart.rows["ddp"].lines[0]] == [4096.0, 2048.0, 8.0]


def test_words() -> None:
    assert [format_ratio(r) for r in (0.0458, 0.288, 1.0, 12.345, 250.0)] == [
        *("0.046x", "0.29x", "1.00x", "12.3x", "250x"),
    ]
    assert [join_words(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        *("a", "a and b", "a, b and c"),
    ]
    assert [count(1, "step"), count(2000, "step"), count(4, "process")] == [
        *("1 step", "2,000 steps", "4 processes"),
    ]


def test_the_table_fits_80_columns() -> None:
    impossible = Record("pipeline", "not_possible", "no")
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(report.console_table(break_run(make_ranked(), impossible, None)))
    lines = console.export_text().splitlines()
    heads = next(n for n, line in enumerate(lines) if line.startswith("strategy"))
    assert [line.split()[0] for line in lines[heads + 1 :][:5]] == [*make_ranked().strategies]
    assert "not possible" in lines[heads + 4]
