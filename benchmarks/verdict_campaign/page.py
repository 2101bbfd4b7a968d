"""Counts the rows of the campaign, and writes them as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from .kinds import KINDS

Row = dict[str, Any]
REFERENCE = "single"


def job_counts(row: Row) -> bool:
    """Tell whether a job counts: at least one strategy was compared, and nothing diverged."""
    return row["outcome"] in ("equal", "alarm")


def fault_counts(row: Row) -> bool:
    """Tell whether a fault counts: it ran, and it changed something that could be measured."""
    return row["outcome"] in ("caught", "refused", "missed")


def line(row: Row) -> str:
    """Return a row as one line: seed, outcome, what was run, where it differed first."""
    what = row["job"]
    if fault := row.get("fault"):
        when = "once" if fault["once"] else "from then on"
        what = f"{fault['kind']} in {fault['strategy']}, step {fault['step']} {when}; {what}"
    found = "; ".join(filter(None, (*_differences(row), _effect(row))))
    ending = f": {found}" if found else ""
    return f"{row['seed']} {row['outcome']} ({row['seconds']:.1f} s): {what}{ending}"


def _differences(row: Row) -> list[str]:
    found = [
        f"{name}: {first['quantity']} of step {first['step']}, {_short(first['got'])} for "
        f"{_short(first['expected'])} ({first['likely_cause']})"
        for name, first in row.get("first", {}).items()
    ]
    named = row.get("reasons", {})
    known = [f"{name}: {reason}" for name, reason in named.items()]
    return found + known + ([row["reason"]] if "reason" in row else [])


def _short(value: Any) -> str:
    return f"{value:.8g}" if isinstance(value, float) else str(value)


def _effect(row: Row) -> str:
    effect = row.get("effect")
    if not effect:
        return ""
    return (
        f"effect {effect['size']:.2g} in {effect['place']}, where rounding may make "
        f"{effect['rounding']:.2g}"
    )


def markdown(jobs: Sequence[Row], faults: Sequence[Row], command: str, machine: str) -> str:
    """Write the counts, then every row that was wrong or did not count."""
    counted = [row for row in jobs if job_counts(row)]
    alarms = [row for row in counted if row["outcome"] == "alarm"]
    visible = [row for row in faults if fault_counts(row)]
    missed = [row for row in visible if row["outcome"] == "missed"]
    late = [row for row in visible if row["late"]]
    seconds = sum(row["seconds"] for row in jobs) / max(1, len(jobs))
    lines = [
        "# Wrong verdicts, counted",
        "",
        f"`{command}`: {machine}.",
        "",
        f"- {len(counted)} comparisons of random small jobs, all of them right: **{len(alarms)} "
        f"false alarms**. A comparison took {seconds:.1f} s on average.",
        f"- {len(visible)} planted faults, {len(late)} of them in the last step or after step 20: "
        f"**{len(missed)} called equal**.",
        "",
        *_tables(counted, faults),
        *_list("False alarms", alarms),
        *_list("Faults that were called equal", missed),
        *_list("Jobs that did not count", [row for row in jobs if not job_counts(row)]),
        *_list("Faults that did not count", [row for row in faults if not fault_counts(row)]),
        *_caught(visible),
    ]
    return "\n".join(lines)


def _tables(jobs: Sequence[Row], faults: Sequence[Row]) -> list[str]:
    """Count the right jobs by strategy and precision, and the faults by kind."""
    pairs = [(name, row) for row in jobs for name in row["verdicts"] if name != REFERENCE]
    names = list(dict.fromkeys(name for name, _ in pairs))
    precisions = list(dict.fromkeys(row["sections"]["train"]["precision"] for row in jobs))
    lines = ["## Right jobs", "", f"| strategy | {' | '.join(sorted(precisions))} |"]
    lines += [f"|---|{'---|' * len(precisions)}"]
    for name in sorted(names):
        cells = [_cell(name, precision, pairs) for precision in sorted(precisions)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    outcomes = ("caught", "refused", "missed", "invisible", "no base", "broken")
    lines += ["", "A cell has the runs that were called equal, of those compared.", ""]
    lines += ["## Planted faults", "", f"| what is wrong | {' | '.join(outcomes)} |"]
    lines += [f"|---|{'---:|' * len(outcomes)}"]
    for name, kind in KINDS.items():
        found = Counter(row["outcome"] for row in faults if row["fault"]["kind"] == name)
        lines.append(f"| {kind.words} | {' | '.join(str(found[o]) for o in outcomes)} |")
    return [*lines, "", *MEANINGS, ""]


MEANINGS = (
    "*Caught*: the verdict says not equal. *Refused*: the run itself ends, as its ranks disagree.",
    "*Invisible*: no loss, norm or weight of the faulty run leaves the right run of the same",
    "strategy by more than rounding may; the list says by how much. *No base*: the right run was",
    "not called equal, so that the fault was not planted. *Broken*: the fault made the run crash,",
    "which proves nothing. The last three do not count.",
)


def _cell(name: str, precision: str, pairs: Iterable[tuple[str, Row]]) -> str:
    found = [
        row["verdicts"][name]
        for other, row in pairs
        if other == name and row["sections"]["train"]["precision"] == precision
    ]
    compared = [verdict for verdict in found if verdict not in ("not possible", "diverged")]
    return f"{compared.count('equal')} of {len(compared)}" if compared else "-"


def _list(title: str, rows: Sequence[Row]) -> list[str]:
    return [f"## {title}", "", *(f"- {line(row)}" for row in rows or []), *_none(rows), ""]


def _none(rows: Sequence[Row]) -> list[str]:
    return [] if rows else ["None."]


def _caught(rows: Sequence[Row]) -> list[str]:
    """List the faults that were found: where, and the cause that the verdict named."""
    head = ["| seed | fault | strategy | step | found in | of step | named cause |"]
    lines = [*head, "|---:|---|---|---:|---|---:|---|"]
    for row in rows:
        fault = row["fault"]
        first = row.get("first", {}).get(fault["strategy"])
        where = f"{first['quantity']} | {first['step']}" if first else f"{row['outcome']} | "
        named = (first and first["likely_cause"]) or row["reasons"].get(fault["strategy"], "-")
        when = f"{fault['step']}{'' if fault['once'] else ' on'}"
        what = f"{row['seed']} | {fault['kind']} | {fault['strategy']} | {when}"
        lines.append(f"| {what} | {where} | {' '.join(named.split())} |")
    return ["## Where each fault was found", "", *lines, ""]
