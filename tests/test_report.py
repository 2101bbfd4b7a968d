"""The report says first whether runs agree, and shows no cost that was not earned."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from hybrid import records, report
from hybrid.records import Comm, Comparison, Difference, EvalResult, Memory, Parity, Receipt, Record
from hybrid.records import StepRecord as Step
from hybrid.records import Throughput as Pace
from hybrid.report.costs import format_pace
from hybrid.report.formats import DASH, format_bytes, format_diff, format_layout
from hybrid.report.plots import Curves, bars, curves

COSTS = ("7,777", "9.99 MiB", "6.66 KiB", "8.88")  # what `make_run` costs, as it is printed
COST_COLUMNS = (2, 4, 5, 6)  # the speedup stands between the first two
STEPS = 30
JOB = {
    **{key: {"name": key} for key in ("model", "data", "optimizer")},
    "train": {"global_batch": 100, "precision": "fp32", "seed": 0},
}


def make_run(name: str, bend: float = 0.0) -> Record:
    """A run whose loss is off by the relative difference `bend` from step 10 on."""
    losses = [(2.0 - step / 20) * (1 + (bend if step >= 10 else 0.0)) for step in range(STEPS)]
    sent = {"calls": [1.0, 1.0], "sent_bytes": [6.66 * 1024, 10.0]}
    return Record(
        name,
        "ok",
        world_size=2,
        layout={"pp": 1, "dp": 2, "replicate": 2, "shard": 1},
        receipt=Receipt(True, {"parameters": "DTensor", "local_over_total": 0.5}),
        steps=[Step(n, loss, 1.0, 0.1, 100, "00") for n, loss in enumerate(losses)],
        eval=EvalResult(0.25, 1000, 951, 0.951),
        throughput=Pace(7777.0, 0.00888, 0.009, 20),
        memory=Memory([int(9.99 * 2**20), 2**20], "live storages"),
        comm=Comm([6.66 * 1024, 10.0], {"all_reduce": sent}, 10),
        environment={"torch": "2.13.0"},
    )


def make_parity(diff: float = 1e-7, ok: bool = True, first: Difference | None = None) -> Parity:
    allowed = {"loss": 1e-6, "grad_norm": 1e-4, "weights": 1e-5}
    return Parity(ok, diff, 2 * diff, allowed, first, state="equal" if ok else "not_equal")


def make_comparison(*names: str) -> Comparison:
    """`single` and `names`, all equal."""
    runs = {name: make_run(name, 1e-7 if name != "single" else 0.0) for name in ("single", *names)}
    parity = {name: make_parity() for name in names}
    return Comparison(JOB, {"cpu": "some"}, "single", runs, parity, True)


def break_run(comparison: Comparison, record: Record, parity: Parity | None) -> Comparison:
    """`comparison` with one run that spoils it."""
    runs = {**comparison.strategies, record.strategy: record}
    verdicts = {k: v for k, v in comparison.parity.items() if k != record.strategy}
    if parity is not None:
        verdicts[record.strategy] = parity
    ok = comparison.ok and (parity.ok if parity else record.status == "not_possible")
    return dataclasses.replace(comparison, strategies=runs, parity=verdicts, ok=ok)


def unequal() -> Comparison:
    first = Difference(10, "loss", 1.5, 1.25, "micro-batches divided twice")
    return break_run(make_comparison("ddp"), make_run("zero2", 0.2), make_parity(0.2, False, first))


def failed(reason: str = "rank 1 died") -> Comparison:
    run = dataclasses.replace(make_run("zero3"), status="failed", reason=reason)
    return break_run(make_comparison("ddp"), run, None)


def not_possible() -> Comparison:
    run = Record("pipeline", "not_possible", "the model has one layer")
    return break_run(make_comparison("ddp"), run, None)


def console_lines(comparison: Comparison) -> list[str]:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(report.console_table(comparison))
    return console.export_text().splitlines()


def table_rows(text: str) -> list[list[str]]:
    """Cells of the Markdown table, split at the pipes that are not escaped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


class Page(HTMLParser):
    """The tags of a page with their attributes, its text outside scripts, what it would load."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.loads: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        loading = ("src", "srcset", "data", "action") + (("href",) if tag != "a" else ())
        self.loads += [value or "" for key, value in attrs if key in loading]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text += data


@pytest.mark.parametrize(
    ("comparison", "start"),
    [
        (make_comparison("ddp", "fsdp"), "Both strategies equal."),
        (
            unequal(),
            "Not equal: zero2 from step 10 (loss); 1 of 2 strategies equal.",
        ),
        (failed(), "Failed: zero3; 1 of 2 strategies equal."),
        (not_possible(), "Equal: ddp computed what single did, 1 not possible here."),
        (make_comparison(), "Nothing compared: only single ran."),
    ],
)
def test_verdict_comes_first(comparison: Comparison, start: str) -> None:
    assert report.markdown(comparison).startswith(f"**{start}**")
    body = report.html(comparison).split("<body>")[1]
    assert body.lstrip().startswith("<header")
    assert unescape(body[: body.index("</h1>")]).endswith(start)


def test_verdict_tells_all_of_a_difference() -> None:
    line = report.markdown(unequal()).splitlines()[0]
    assert "zero2 leaves single at step 10 in loss: got 1.5, expected 1.25" in line
    assert "likely cause: micro-batches divided twice" in line
    assert "They differ by at most 1e-7 in the loss, 2e-7 in the weights." in line


def test_problems_outrank_a_comparison_that_calls_itself_ok() -> None:
    assert not report.verdict(dataclasses.replace(unequal(), ok=True)).ok
    assert not report.verdict(dataclasses.replace(make_comparison("ddp"), ok=False)).ok


def test_nothing_agrees_with_a_reference_that_failed() -> None:
    run = dataclasses.replace(make_run("single"), status="failed", reason="no memory")
    comparison = break_run(make_comparison("ddp"), run, None)
    text = report.markdown(comparison := dataclasses.replace(comparison, parity={}))
    assert console_lines(comparison)[0].startswith("Not compared: the reference single failed.")
    assert text.startswith("**Not compared: the reference single failed.**")
    assert "ddp was not compared: the reference single failed" in text
    assert "differs from" not in text and "leaves single" not in text
    assert not any(cost in text for cost in COSTS)


def unproved(receipt: Receipt | None) -> Comparison:
    run = dataclasses.replace(make_run("fsdp"), receipt=receipt)
    return break_run(make_comparison("ddp"), run, make_parity())


@pytest.mark.parametrize(
    ("comparison", "name"),
    [
        (unequal(), "zero2"),
        (failed(), "zero3"),
        (not_possible(), "pipeline"),
        (unproved(None), "fsdp"),
        (unproved(Receipt(False, {}, "parameters are plain")), "fsdp"),
        (break_run(make_comparison("ddp"), make_run("zero1"), None), "zero1"),
    ],
)
def test_no_cost_without_parity(comparison: Comparison, name: str) -> None:
    rows = {row[0]: row for row in table_rows(report.markdown(comparison))}
    assert [rows["ddp"][n] for n in COST_COLUMNS] == list(COSTS)
    assert [rows[name][n] for n in COST_COLUMNS] == [DASH] * 4
    said = report.verdict(comparison)
    assert any(text.startswith(f"{name} ") for text in (*said.details, *said.notes))
    assert [set(drawn.rows) for drawn in bars(comparison)] == [{"single", "ddp"}] * 3
    lines = console_lines(comparison)
    line = next(line for line in lines if re.match(rf"\W*{name} .*{DASH}", line))
    assert not any(cost in line for cost in COSTS)


def test_reasons_are_given() -> None:
    for comparison, reason in ((failed(), "rank 1 died"), (not_possible(), "has one layer")):
        assert reason in report.markdown(comparison)
        assert reason in Page(report.html(comparison)).text


def test_page_loads_nothing_and_names_what_it_shows() -> None:
    source = report.html(unequal())
    assert Page(source).loads == []
    assert "default-src 'none'" in source
    assert (source.count("Plotly.newPlot("), source.count("<div class=bars>")) == (2, 3)
    own = re.sub(r"<script[^>]*>.*?</script>", "", source, flags=re.DOTALL)
    assert not re.search(r"https?:|@import|url\(", own)
    assert (source.count('scope="col"'), source.count('scope="row"')) == (11, 3)
    assert source.count("<figure><h2>") == source.count("<figcaption>") == 5


def test_a_run_that_did_not_finish_is_a_failure() -> None:
    for name, start in (("ddp", "Failed: ddp; 1 of 2"), ("single", "Not compared: the reference")):
        run = dataclasses.replace(make_run(name), status="running")
        comparison = break_run(make_comparison("ddp", "fsdp"), run, None)
        assert not report.verdict(comparison).ok
        texts = [Page(report.html(comparison)).text, report.markdown(comparison)]
        texts.append(" ".join(console_lines(comparison)))
        assert all(start in text and "it did not finish" in text for text in texts)


def test_markdown_table_is_well_formed() -> None:
    for comparison in (make_comparison("ddp", "a|b"), unequal(), failed(), not_possible()):
        header, rule, *rows = table_rows(report.markdown(comparison))
        assert len(rows) == len(comparison.strategies)
        assert {len(row) for row in (header, rule, *rows)} == {11}
        assert all(re.fullmatch("-+:?", cell) for cell in rule)


def difference_plot(comparison: Comparison) -> Curves:
    return next(c for c in curves(comparison) if c.title == "Difference from the reference")


def test_differences_of_zero_have_a_line_of_their_own() -> None:
    plot = difference_plot(make_comparison("ddp"))
    (ddp,) = plot.figure["data"]
    axis = plot.figure["layout"]["yaxis"]
    assert ddp["y"][:10] == [axis["tickvals"][0]] * 10
    assert axis["ticktext"][0] == ddp["customdata"][0] == "equal"
    assert ddp["y"][10:] == pytest.approx([1e-7] * 20, rel=1e-3)
    assert [shape["y0"] for shape in plot.figure["layout"]["shapes"]] == [1e-6]


def test_local_sgd_is_drawn_from_its_emulation() -> None:
    comparison = make_comparison("local_sgd")
    run = dataclasses.replace(
        make_run("local_sgd", 0.5),
        drift=[{"step": n, "max_relative_drift": 0.1, "mean_relative_drift": 0.05} for n in (0, 1)],
    )
    judged = dataclasses.replace(make_parity(0.0), reference="local_sgd_emulation")
    comparison = dataclasses.replace(
        break_run(comparison, run, judged),
        controls={"local_sgd_emulation": make_run("single", 0.5)},
    )
    (only,) = difference_plot(comparison).figure["data"]
    assert only["name"] == "local_sgd (as local_sgd_emulation)"
    assert set(only["customdata"]) == {"equal"}
    assert "local_sgd computed what local_sgd_emulation did" in report.markdown(comparison)
    assert "Drift between ranks" in report.html(comparison)


def test_numbers_are_human() -> None:
    sizes = (512, 1000, 2**20, 123.4 * 2**20, 5e15)
    texts = ["512 B", "0.977 KiB", "1.00 MiB", "123 MiB", "4,547 TiB"]
    assert [format_bytes(size) for size in sizes] == texts
    diffs = (None, 0.0, 3.14e-7, 1e-10, 0.25)
    assert [format_diff(diff) for diff in diffs] == [DASH, "0", "3.1e-7", "1e-10", "0.25"]
    assert format_layout({"pp": 2, "dp": 2, "replicate": 1, "shard": 1}) == "pp 2, dp 2"
    assert format_layout({"dp": 4, "replicate": 2, "shard": 2}) == "dp 4, replicate 2, shard 2"


def test_steps_that_are_unlike_show_their_mean() -> None:
    assert format_pace(Pace(1000.0, 0.1, 0.11, 20)) == "1,000"
    assert format_pace(Pace(1000.0, 0.1, 0.2, 20)) == "1,000 (mean 500)"


def test_write_leaves_three_files(tmp_path: Path) -> None:
    comparison = make_comparison("ddp")
    paths = report.write(comparison, tmp_path / "out")
    assert [path.name for path in paths] == ["compare.json", "compare.md", "report.html"]
    assert records.read(Comparison, paths[0]) == comparison
    texts = [report.markdown(comparison), report.html(comparison)]
    assert [path.read_text() for path in paths[1:]] == texts


def test_without_plotly_the_page_has_no_curves_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    *_, page = report.write(make_comparison("ddp"), tmp_path)
    said = "its curves need plotly, which is not installed: pip install hybrid[report]"
    assert capsys.readouterr().err == f"hybrid: warning: report.html: {said}\n"
    assert said in page.read_text() and "Equal" in page.read_text()
