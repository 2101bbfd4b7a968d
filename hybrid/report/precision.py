"""The precision ledgers of all runs side by side, and what it means where one differs.

A ledger is what one rank of a live run, rank 0, held and computed in; its rows are explained in
`hybrid/strategies/_precision.py`. All text is plain; each format escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hybrid.records import Comparison
from hybrid.report.formats import DASH, format_value

KINDS = (  # in the order in which a step meets them; a ledger may have more
    "computing",
    "activations",
    "stored",
    "gradients",
    "reductions",
    "master_weights",
    "optimizer_state",
    "buffers",
)
NOTHING = "none"  # a rank with nothing of a kind does not differ in it
MEANINGS = {
    "computing": "layers read their parameters in another precision",
    "activations": "layers hand on what they computed in another precision",
    "stored": "parameters are kept in another precision",
    "gradients": "gradients of micro-batches are summed in another precision",
    "reductions": "gradients are rounded differently on their way between ranks",
    "master_weights": "the optimizer steps weights of another precision; few bits lose updates",
    "optimizer_state": "the optimizer remembers in another precision",
    "buffers": "values that are not trained, such as rotary tables, are kept in another precision",
}
Ledgers = Mapping[str, Mapping[str, str]]


class Cell(NamedTuple):
    """A dtype, and whether the reference has another."""

    text: str
    differs: bool


class Precision(NamedTuple):
    """Sentences, and below `headers` a row of cells for each run with a ledger. No rows where a
    sentence says it all."""

    sentences: list[str]
    headers: list[str]
    rows: dict[str, list[Cell]]


def compare_precision(comparison: Comparison) -> Precision | None:
    """What the runs held and computed in; None where no run left a ledger."""
    ledgers, reference = _read_ledgers(comparison), comparison.reference
    if not ledgers:
        return None
    found = {dtype for ledger in ledgers.values() for dtype in ledger.values()}
    if len(found - {NOTHING}) == 1 and reference in ledgers:
        (dtype,) = found - {NOTHING}
        return Precision([f"{', '.join(ledgers)} held and computed everything in {dtype}."], [], {})
    extra = {kind: None for ledger in ledgers.values() for kind in ledger if kind not in KINDS}
    kinds = [k for k in KINDS if any(k in ledger for ledger in ledgers.values())] + [*extra]
    rows = {
        name: [
            Cell(own.get(kind, DASH), _differs(own, ledgers.get(reference, {}), kind))
            for kind in kinds
        ]
        for name, own in ledgers.items()
    }
    sentences = ["What rank 0 of each run held and computed in.", *_tell(ledgers, reference, kinds)]
    if NOTHING in found:
        sentences.append(f'"{NOTHING}": this rank has nothing of the kind.')
    return Precision(sentences, ["strategy", *map(_words, kinds)], rows)


def _read_ledgers(comparison: Comparison) -> dict[str, dict[str, str]]:
    evidence = {n: run.receipt.evidence for n, run in comparison.strategies.items() if run.receipt}
    ledgers = {name: found["precision"] for name, found in evidence.items() if "precision" in found}
    return {n: {k: format_value(v) for k, v in own.items()} for n, own in ledgers.items()}


def _differs(own: Mapping[str, str], expected: Mapping[str, str], kind: str) -> bool:
    both = {own.get(kind, NOTHING), expected.get(kind, NOTHING)}
    return len(both) > 1 and NOTHING not in both


def _tell(ledgers: Ledgers, reference: str, kinds: list[str]) -> list[str]:
    """One sentence for each way to differ, with the runs that do."""
    if reference not in ledgers:
        return [f"{reference} left no ledger to compare with."]
    expected = ledgers[reference]
    sharing: dict[tuple[str, str, str], list[str]] = {}
    for kind in kinds:
        for name, own in ledgers.items():
            if _differs(own, expected, kind):
                sharing.setdefault((kind, own[kind], _meaning(kind, own)), []).append(name)
    told = [
        f"{_words(kind).capitalize()} in {dtype} under {', '.join(names)} "
        f"({reference}: {expected[kind]}): {meaning}."
        for (kind, dtype, meaning), names in sharing.items()
    ]
    return told or [f"No run differs from {reference}."]


def _meaning(kind: str, own: Mapping[str, str]) -> str:
    masters = own.get("master_weights", NOTHING)
    if kind == "stored" and masters not in (own[kind], NOTHING):
        return (
            f"parameters rounded once a step lie beside their {masters} master weights, instead of "
            "being rounded at each use; this changes memory, not what is computed"
        )
    return MEANINGS.get(kind, "another precision than the reference's")


def _words(kind: str) -> str:
    return kind.replace("_", " ")
