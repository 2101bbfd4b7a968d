"""This module sets the precision ledgers of all runs side by side and says what a difference means.

A ledger lists what rank 0 of a live run held and computed in; its rows are explained in
`hybrid/engines/precision.py`. All text is plain; each output format escapes it."""

from collections.abc import Mapping
from typing import NamedTuple

from ..records import Comparison
from .formats import DASH, format_value, group_names

NOTHING = "none"  # a rank with nothing of a kind does not differ in it
MEANINGS = {  # in the order in which a step meets them; a ledger may have more
    "computing": "layers read their parameters in another precision",
    "activations": "layers hand on what they computed in another precision",
    "stored": "parameters are kept in another precision",
    "gradients": "gradients of micro-batches are summed in another precision",
    "reductions": "gradients are rounded differently on their way between ranks",
    "master_weights": "the optimizer steps weights of another precision; few bits lose updates",
    "optimizer_state": "the optimizer remembers in another precision",
    "buffers": "values that are not trained, such as rotary tables, are kept in another precision",
    "fp32_products": "products of fp32 values are rounded to fewer bits",
}
KINDS = tuple(MEANINGS)


class Cell(NamedTuple):
    """Holds a dtype, and says whether the reference has another."""

    text: str
    differs: bool


class Precision(NamedTuple):
    """Holds sentences and, below `headers`, a row of cells for each run with a ledger.

    There are no rows where a sentence says it all."""

    sentences: list[str]
    headers: list[str]
    rows: dict[str, list[Cell]]


def compare_precision(comparison: Comparison) -> Precision | None:
    """Say what the runs held and computed in; return None where no run left a ledger."""
    ledgers, reference = _read_ledgers(comparison), comparison.reference
    if not ledgers:
        return None
    found = {dtype for ledger in ledgers.values() for dtype in ledger.values()}
    if len(found - {NOTHING}) == 1 and reference in ledgers:
        (dtype,) = found - {NOTHING}
        return Precision([f"{', '.join(ledgers)} held and computed everything in {dtype}."], [], {})
    used = dict.fromkeys(kind for ledger in ledgers.values() for kind in ledger)
    kinds = [kind for kind in KINDS if kind in used] + [kind for kind in used if kind not in KINDS]
    expected = ledgers.get(reference, {})
    rows = {
        name: [Cell(own.get(kind, DASH), _differs(own, expected, kind)) for kind in kinds]
        for name, own in ledgers.items()
    }
    sentences = [
        "This is what rank 0 of each run held and computed in.",
        *_tell(ledgers, reference, kinds),
        *([f'"{NOTHING}": this rank has nothing of the kind.'] if NOTHING in found else []),
    ]
    return Precision(sentences, ["strategy", *(kind.replace("_", " ") for kind in kinds)], rows)


def _read_ledgers(comparison: Comparison) -> dict[str, dict[str, str]]:
    evidence = {n: run.receipt.evidence for n, run in comparison.strategies.items() if run.receipt}
    ledgers = {name: found["precision"] for name, found in evidence.items() if "precision" in found}
    return {n: {k: format_value(v) for k, v in own.items()} for n, own in ledgers.items()}


def _differs(own: Mapping[str, str], expected: Mapping[str, str], kind: str) -> bool:
    both = {own.get(kind, NOTHING), expected.get(kind, NOTHING)}
    return len(both) > 1 and NOTHING not in both


def _tell(ledgers: Mapping[str, Mapping[str, str]], reference: str, kinds: list[str]) -> list[str]:
    """Tell each way to differ in one sentence that names the runs."""
    if reference not in ledgers:
        return [f"{reference} left no ledger to compare with."]
    expected = ledgers[reference]
    sharing = group_names(
        (name, (kind, own[kind], _explain(kind, own)))
        for kind in kinds
        for name, own in ledgers.items()
        if _differs(own, expected, kind)
    )
    told = [
        f"{kind.replace('_', ' ').capitalize()} in {dtype} under {names} "
        f"({reference}: {expected[kind]}): {meaning}."
        for (kind, dtype, meaning), names in sharing.items()
    ]
    return told or [f"No run differs from {reference}."]


def _explain(kind: str, own: Mapping[str, str]) -> str:
    masters = own.get("master_weights", NOTHING)
    if kind == "stored" and masters not in (own[kind], NOTHING):
        return (
            f"parameters rounded once a step lie beside their {masters} master weights, instead of "
            "being rounded at each use; this changes memory, not what is computed"
        )
    return MEANINGS.get(kind, "another precision than the reference's")
