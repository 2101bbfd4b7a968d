"""What people look at: a `Comparison` as Markdown, as one HTML page, as a table in a terminal.

    from hybrid import report
    report.write(comparison, Path("out"))            # compare.json, compare.md, report.html
    rich.print(report.console_table(comparison))     # the short table

The verdict comes first, and no cost is shown for a run that did not prove that it computed the same
thing. Needs no torch; `html` needs plotly and `console_table` rich, imported where they are used.
"""

from hybrid.report.markdown import console_table, markdown
from hybrid.report.page import html, write
from hybrid.report.verdict import verdict

__all__ = ["console_table", "html", "markdown", "verdict", "write"]
