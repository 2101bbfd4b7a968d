"""Writes the page of `benchmarks.checkpoint_pairs` from its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def markdown(rows: Sequence[Row], names: Sequence[str], command: str, machine: str) -> str:
    """Write the counts, a table of all pairs in fp32, the others, and what does not hold."""
    ran = [row for row in rows if "hash_same" in row]
    full, few = (
        [row for row in rows if (row["precision"] == "fp32") == fp32] for fp32 in (True, False)
    )
    pairs = {(row["source"], row["target"]) for row in full}
    alike = [row for row in ran if row["bits_same"] is not None]
    lines = [
        "# Checkpoints between all pairs of strategies",
        "",
        f"`{command}`: {machine}.",
        "",
        f"{len(pairs)} ordered pairs of {len(names)} strategies in fp32, {len(full)} resumed runs; "
        f"{len(few)} more in bf16. `benchmarks/checkpoint_pairs.py` says what holds means.",
        "",
        *_count("outcome of all", Counter(row["outcome"] for row in rows)),
        *_count("state hash after loading", Counter(_say(row["hash_same"]) for row in ran)),
        *_count("verdict against `single`", Counter(row["verdict"] for row in ran)),
        *_count(
            "end in the same layout, bit for bit", Counter(_say(row["bits_same"]) for row in alike)
        ),
        *_greatest(ran),
        "",
        *_table(full, names),
        "",
        "Rows saved, columns resumed. In each cell: the processes that resumed, and the greatest "
        "relative difference of the next five losses from those of the run that saved (with local "
        "SGD on one side: of `single` or an emulation that went on from there); =: to the bit.",
        "",
    ]
    if few:
        lines += ["In bf16:", "", *[f"- {_describe(row)}" for row in few], ""]
    if odd := [row for row in rows if row["outcome"] != "holds"]:
        lines += ["Not held, or not possible:", "", *[f"- {_describe(row)}" for row in odd], ""]
    return "\n".join(lines)


def _say(same: bool) -> str:
    return "the same" if same else "another"


def _count(what: str, counts: Counter[str]) -> list[str]:
    return [f"- {what}: {', '.join(f'{n} {key}' for key, n in counts.most_common()) or 'none'}"]


def _greatest(ran: Sequence[Row]) -> list[str]:
    """Tell the greatest difference by precision, and the time that a pair took."""
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in ran):
        worst = max((r for r in ran if r["precision"] == precision), key=lambda r: r["next_steps"])
        lines.append(
            f"- greatest relative difference of the next five losses in {precision}: "
            f"{worst['next_steps']:.2g} ({worst['pair']})"
        )
    seconds = sorted(row["seconds"] for row in ran)
    if seconds:
        lines.append(
            f"- seconds a pair, with the runs that it was the first to need: median "
            f"{seconds[len(seconds) // 2]}, most {seconds[-1]}, {sum(seconds):.0f} in all"
        )
    return lines


def _table(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    lines = [f"| saved by | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for source in names:
        mine = [row for row in rows if row["source"] == source]
        ranks = next((row["source_ranks"] for row in mine), 0)
        cells = [", ".join(_cell(r) for r in mine if r["target"] == name) for name in names]
        lines.append(f"| {source} on {ranks} | {' | '.join(cells)} |")
    return lines


def _cell(row: Row) -> str:
    if row["outcome"] != "holds":
        return f"{row['target_ranks']}: **{row['outcome']}**"
    size = "=" if row["next_steps"] == 0 else f"{row['next_steps']:.1g}".replace("e-0", "e-")
    return f"{row['target_ranks']}: {size}"


def _describe(row: Row) -> str:
    """Return a row as a sentence."""
    start = f"{row['pair']}: {row['outcome']}"
    if "hash_same" not in row:
        return f"{start}: {row['reason']}"
    return (
        f"{start}: state hash {_say(row['hash_same'])}; next losses within "
        f"{row['next_steps']:.2g} of {row['against']}; verdict {row['verdict']}"
        f"{'' if row['reason'] is None else ' (' + row['reason'] + ')'}"
        f"{'' if row['bits_same'] is not False else '; other bits at the end'}"
    )
