"""Finds the runs that cost least among those that are proved equal. Starts no run."""

from collections.abc import Mapping

from ..records import Best, Parity, Record
from ..report.costs import collect_costs, find_meaning, rank_best


def find_best(runs: Mapping[str, Record], parity: Mapping[str, Parity]) -> Best:
    """Return the fastest run, the one with least memory, and the one that sends fewest bytes.

    Only runs whose parity is equal and whose receipt holds take part, the reference among them. The
    figures are those of the table, so that all runs are ranked by the same."""
    equal = {
        name: run
        for name, run in runs.items()
        if name in parity and parity[name].ok and run.receipt and run.receipt.engaged
    }
    return rank_best(collect_costs(equal, find_meaning(runs)))
