"""Every text that reaches the page, compare.md or a terminal is text there, whoever wrote it.

`tests.test_report_markup` plants markup in a comparison that it names place by place. Here nothing
is named: whatever text stands in a comparison's records, and then whatever text the templates are
given, is replaced, so that a text that comes later is looked at too."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from jinja2 import DictLoader

from hybrid import report
from hybrid.job.shown import without_controls
from hybrid.records import Best, Comparison, ReferenceFault, ResumedFrom, SavedState, Weights
from hybrid.report import files
from tests.conftest import ROOT
from tests.test_report import Page
from tests.test_report_markup import make_planted

EVIL = (
    "</script><script>f()</script></title><img src=x onerror=f()> & &lt;b&gt; \"x\" 'y' |a| `b` *c*"
    " _d_ [e](f) ]]> --> {{ 7 * 7 }} {% if %} <!--\n# h\n- i\n\x1b[31m\x07\u202e\udcff "
)
MEANT = ("ok", "failed", "not_possible", "running", "equal", "not_equal", "not_compared")
KEYS = ("sent_bytes", "precision", "stored", "tensors", "path", "kind")  # the code asks for these
Change = Callable[[str], str]


def evil(text: str) -> str:
    """Markup, with the text that it takes the place of, so that equal ones stay equal."""
    return f"{EVIL}{plain(text)}"


def plain(text: str) -> str:
    """A word without markup for a text."""
    return f"t{abs(hash(text)) % 10**8:08d}z"


def harmless(text: str) -> str:
    """As long as the evil one is where it is shown."""
    return f"{'h' * len(without_controls(EVIL))}{plain(text)}"


def replaced(value: Any, change: Change, keys: bool = True) -> Any:
    """A record, or what a template is given, with every text in it changed but those with a meaning
    for the code: a status, and the names of the job's sections."""
    if isinstance(value, str):
        return value if value in MEANT or not value else change(value)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        named = {n: replaced(v, change, n != "job") for n, v in fields.items() if n != "tolerance"}
        return dataclasses.replace(value, **named)  # type: ignore[type-var]
    if isinstance(value, Mapping):
        kept = value if not keys or "difference" in value else KEYS
        return {k if k in kept else change(k): replaced(v, change, keys) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        return type(value)(*(replaced(item, change, keys) for item in value))
    return [replaced(x, change, keys) for x in value] if isinstance(value, (list, tuple)) else value


def everything() -> Comparison:
    """A comparison in which every field of the records that can have a text has one."""
    made = make_planted()
    full = {
        "warnings": ["warns"],
        "checkpoint": SavedState(3, "hash"),
        "resumed_from": ResumedFrom("from", 2, "hash"),
        "weights": Weights({"w": 1.0}, {"w": 2.0}, "file"),
        "weights_from": {"path": "path", "kind": "kind", "tensors": 3},
        "variant_of": "variant",
    }
    runs = {name: dataclasses.replace(run, **full) for name, run in made.strategies.items()}
    first = next(iter(runs))
    fault = ReferenceFault(3, "lost", 0.1, ["one run"])
    best = Best(first, first, first)
    given = {"strategies": runs, "best": best, "reference_fault": fault}
    parity = {
        name: dataclasses.replace(one, reason="why", refused=["no"], reference_because="because")
        for name, one in made.parity.items()
    }
    return dataclasses.replace(made, parity=parity, **given)


def require_text(page: str, expected: str, where: str) -> Page:
    """The page has the tags of the one without markup, and shows what it was given as text."""
    found, other = Page(page), Page(expected)
    assert found.tags == other.tags, where
    assert (found.attributes, found.loads) == (other.attributes, other.loads), where
    ours = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)  # plotly's own has some
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", ours), where
    return found


def test_every_text_of_a_comparison_is_text_on_the_page() -> None:
    made = everything()
    pages = [report.html(replaced(made, change)) for change in (evil, harmless)]
    page = require_text(*pages, "report.html")
    assert page.text.count("</script><script>") > 50


def test_every_text_of_a_comparison_is_text_in_markdown_and_in_a_terminal() -> None:
    from rich.console import Console

    made = everything()
    texts = [report.markdown(replaced(made, change)) for change in (evil, harmless)]
    require_markdown(*texts)
    shown = Console(file=io.StringIO(), force_terminal=False, width=400)
    shown.print(report.console_table(replaced(made, evil)))
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown.file.getvalue())


def require_markdown(text: str, expected: str) -> None:
    """The text has the lines and cells of the one without markup, and every mark is escaped."""
    assert not re.search(r"(?<!\\)[<`&]", text)
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", text)
    marks = [
        [len(re.findall(rf"(?<!\\){mark}", line)) for mark in (r"\|", r"\*", r"\[")]
        for lines in (text, expected)
        for line in lines.splitlines()
    ]
    half = len(marks) // 2
    assert marks[:half] == marks[half:]
    starts = [[line[:2] for line in lines.splitlines()] for lines in (text, expected)]
    assert [s for s in starts[0] if s in ("# ", "- ", "> ")] == [
        s for s in starts[1] if s in ("# ", "- ", "> ")
    ]


# What the templates are given that is no text to be shown: HTML of plotly, words of the code.
NO_TEXT = ("html", "tone", "title", "headers", "flush_left")


def given_to_templates(value: Any, change: Change) -> Any:
    """What a template is given, with every text changed that it is to show."""
    if isinstance(value, Mapping):
        return {k: v if k in NO_TEXT else given_to_templates(v, change) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._replace(**given_to_templates(value._asdict(), change))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **given_to_templates(fields, change))
    if isinstance(value, (list, tuple)):
        return [given_to_templates(item, change) for item in value]
    return change(value) if isinstance(value, str) and value else value


def render(monkeypatch: pytest.MonkeyPatch, change: Change, templates: dict[str, str]) -> list[str]:
    """The page and the markdown of these templates, with every text changed that they are given."""
    real = files._render

    def planted(template: str, values: dict[str, Any], **escaping: Any) -> str:
        loaded = {name: text for name, text in templates.items()}
        with monkeypatch.context() as patch:
            patch.setattr("jinja2.FileSystemLoader", lambda *_: DictLoader(loaded))
            return real(template, given_to_templates(values, change), **escaping)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_render", planted)
        patch.setattr(files, "_draw", lambda _: None)  # plotly's script takes long to be parsed
        return [report.html(everything()), report.markdown(everything())]


PAGE = "report.html.j2"
TEMPLATES = {file.name: file.read_text() for file in (ROOT / "hybrid" / "report").glob("*.j2")}


def test_every_text_that_a_template_is_given_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    (page, text), (page0, text0) = (render(monkeypatch, f, TEMPLATES) for f in (evil, harmless))
    require_text(page, page0, "report.html")
    require_markdown(text, text0)


@pytest.mark.parametrize(
    "shown", ["verdict.headline", "detail", "note", "sentence", "run.cut", "text", "row.text"]
)
def test_a_text_that_is_not_escaped_is_seen(shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = re.sub(rf"{{{{ {re.escape(shown)} }}}}", f"{{{{ {shown}|safe }}}}", TEMPLATES[PAGE])
    assert broken != TEMPLATES[PAGE]
    made = [render(monkeypatch, f, {**TEMPLATES, PAGE: broken})[0] for f in (evil, harmless)]
    with pytest.raises(AssertionError, match=r"report\.html"):
        require_text(*made, "report.html")
