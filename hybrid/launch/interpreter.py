"""This module says how this package starts Python, so that no file of a user's hides a library's.

By `-m` Python looks for modules in the current folder first, and a `random.py` there would break
whatever imports Python's own. With `-P` it does not look there; what a job names is looked for
there last (`hybrid.job.imports`). The module needs no torch."""

import os
import sys
from collections.abc import Sequence

from ..job.traces import OWN_PACKAGE


def start_words(program: Sequence[str]) -> list[str]:
    """Return the words that start `program`, which Python is the first word of.

    Where this package itself may be found in the current folder alone, that stays the first that
    Python looks in."""
    ours = [*program[:2]] == [sys.executable, "-m"]
    if not ours or os.path.dirname(OWN_PACKAGE) == os.path.realpath(os.curdir):
        return [*program]
    return [sys.executable, "-P", *program[1:]]
