"""This module has Python look for garbage rarely while modules are imported and a run is set up.

Importing torch and DeepSpeed makes a million objects that stay. Python's own setting looks through
them again and again, which is a tenth of what a command's start costs."""

import gc

RARELY = (100_000, 20, 100)  # objects that are new, and how often older ones are looked through

_usual: list[tuple[int, int, int]] = []


def collect_rarely() -> None:
    """Look for garbage rarely from now on."""
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(*RARELY)


def collect_as_usual() -> None:
    """Look for garbage as this process did before `collect_rarely`, if it was called.

    Steps make garbage that may hold large tensors."""
    if _usual:
        gc.set_threshold(*_usual.pop())
