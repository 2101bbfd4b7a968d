"""This package shows a `Comparison` as Markdown, as an HTML page and as a table in a terminal.

    from hybrid import report
    report.write(comparison, Path("out"))            # compare.json, compare.md, report.html
    rich.print(report.console_table(comparison))     # the short table

The verdict comes first, and no cost is shown for a run that is not proved equal to its reference.
The package needs no torch; the functions that use Jinja2, plotly or rich import them."""

from .files import html, markdown, write
from .table import console_table
from .verdict import tell_fault, verdict

__all__ = ["console_table", "html", "markdown", "tell_fault", "verdict", "write"]
