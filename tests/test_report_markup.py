"""Markup in any text of a comparison reaches the page, compare.md and plotly as plain text."""

from __future__ import annotations

import dataclasses
import json
import re

from hybrid import records, report
from hybrid.records import Comm, Comparison, Difference, EvalResult, Memory, Receipt, Record
from hybrid.report.plots import curves
from tests.conftest import ROOT
from tests.test_report import JOB, Page, make_parity, make_run, table_rows

EVIL = "</script><script>alert('x')</script><img src=http://evil.example/x> \" onload=\"f() `a` *b*"
EVIL += " | {{ 7 * 7 }} planted in"
STANDINGS = ("unequal", "failed", "unproved", "impossible", "unfinished", "uncompared")


def plant(where: str) -> str:
    """A text full of markup, which ends in the name of the place that it is planted in."""
    return f"{EVIL} {where}"


def make_trusted(name: str) -> Record:
    """A run with markup in all that a trusted run shows."""
    evidence = {
        plant("key"): {plant("inner key"): [plant("item")], "line": plant("line")},
        "precision": {plant("kind"): plant("dtype"), "stored": plant(f"dtype of {name}")},
    }
    return dataclasses.replace(
        make_run(plant(name)),
        layout={plant("axis"): 2},
        receipt=Receipt(True, evidence),
        environment={plant("variable"): plant("setting")},
        memory=Memory([5, 4], plant("instrument")),
        comm=Comm([5.0], {plant("operation"): {"sent_bytes": [5.0]}}, 1),
        eval=EvalResult(0.5, 8),
    )


def make_planted() -> Comparison:
    """A comparison with markup in every text, in its runs of every standing."""
    names = {name: plant(name) for name in ("reference", "equal", *STANDINGS)}
    runs = {name: make_trusted(name) for name in ("reference", "equal")}
    runs |= {name: make_run(names[name]) for name in ("unequal", "uncompared")}
    doubt = Receipt(False, {}, plant("doubt"))
    runs["unproved"] = dataclasses.replace(make_run(names["unproved"]), receipt=doubt)
    runs["failed"] = Record(names["failed"], "failed", plant("reason of failure"))
    runs["impossible"] = Record(names["impossible"], "not_possible", plant("reason"))
    runs["unfinished"] = Record(names["unfinished"], "running")
    first = Difference(
        10, plant("quantity"), plant("got"), plant("expected"), plant("likely cause")
    )
    excused = {"step": 25, "quantity": plant("excused"), "difference": 3e-6, "control": 1e-6}
    emulation = plant("emulation")
    equal = dataclasses.replace(make_parity(), reference=emulation, excused=[excused])
    other = dataclasses.replace(make_parity(0.2, False, first), reference=names["reference"])
    job = {key: {"name": plant(key)} for key in ("model", "data", "optimizer")}
    train = {key: plant(key) for key in JOB["train"]}
    return Comparison(
        {**job, "train": train, plant("section"): {plant("option"): plant("choice")}},
        {plant("part"): plant("of the machine")},
        names["reference"],
        {run.strategy: run for run in runs.values()},
        {names["equal"]: equal, names["unequal"]: other},
        False,
        {emulation: make_run(emulation)},
    )


def as_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def test_markup_in_every_text_reaches_the_page_as_text() -> None:
    text = records.dumps(comparison := make_planted())
    places = set(re.findall(f"{re.escape(as_json(EVIL))} ([a-z ]+)", text))
    assert len(places) == 41
    as_long = "h" * len(EVIL)  # so that a long reason is long in both
    harmless = records.from_dict(Comparison, json.loads(text.replace(as_json(EVIL), as_long)))
    page, expected = Page(report.html(comparison)), Page(report.html(harmless))
    assert page.tags == expected.tags
    assert (page.attributes, page.loads) == (expected.attributes, [])
    shown = " ".join(page.text.split())
    assert not {where for where in places if plant(where) not in shown}


def test_names_in_a_figure_are_escaped_for_plotly() -> None:
    figures = [drawn.figure for drawn in curves(make_planted())]
    names = [trace["name"] for figure in figures for trace in figure["data"]]
    assert len(names) > 5 and not any("<" in name for name in names)


def test_markup_in_every_text_reaches_the_markdown_as_text() -> None:
    text = report.markdown(make_planted())
    assert not re.search(r"(?<!\\)[<`*]", text.replace("**", ""))
    assert len({len(row) for row in table_rows(text)}) == 1


def test_only_what_plotly_draws_is_taken_for_markup() -> None:
    templates = [file.read_text() for file in (ROOT / "hybrid" / "report").glob("*.j2")]
    assert len(templates) == 2
    assert re.findall(r"\S+ *\| *safe|autoescape", "".join(templates)) == ["figure.html|safe"]
