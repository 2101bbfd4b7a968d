"""Lets a loop that does not return before its end make some steps at a time.

hybrid's own loop and transformers' Trainer call back after each step. Such a loop runs in a
greenlet: it stops in that callback, and goes on there when it is asked for more steps. So the rows
of one process take turns, all in its main thread, where a run's loop is too. In a thread of its
own, the hand-written loop as well took up to 4 % longer (`LOG_TESTS.md`).
"""

import contextlib
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

Within = contextlib.AbstractContextManager[Any]
OnStep = Callable[[Any], None]


class Driven:
    """Runs `loop(on_step)`, which calls `on_step(loss)` after each step and never ends."""

    def __init__(self, loop: Callable[[OnStep], None]) -> None:
        self._loop = loop
        self._running = greenlet(self._run_loop)
        self._left, self._within, self._losses = 0, contextlib.nullcontext(), list[Any]()

    def run(self, steps: int, within: Within) -> list[Any]:
        """Make so many steps in the context `within`, which the loop enters and leaves.
        Returns their losses, and raises what the loop raised."""
        if self._running.dead:
            raise RuntimeError("the loop has ended")
        self._left, self._within, self._losses = steps, within, []
        self._running.parent = getcurrent()  # gets what the loop raises
        self._running.switch()
        return self._losses

    def _run_loop(self) -> None:
        self._within.__enter__()
        self._loop(self._on_step)
        raise RuntimeError("the loop has ended")

    def _on_step(self, loss: Any) -> None:
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            self._within.__exit__(None, None, None)
            self._running.parent.switch()
            self._within.__enter__()
