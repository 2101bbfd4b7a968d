"""Lets a loop that does not return before its end make some steps at a time.

hybrid's own loop and transformers' Trainer call back after each step. Such a loop runs in a thread
of its own, which waits in that callback until it is asked for more steps. While it waits, other
rows run; while it runs, the thread that asked waits. So the rows of one process can take turns.
"""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

Within = contextlib.AbstractContextManager[Any]
OnStep = Callable[[Any], None]


class Driven:
    """Runs `loop(on_step)`, which calls `on_step(loss)` after each step and never ends."""

    def __init__(self, loop: Callable[[OnStep], None]) -> None:
        self._loop = loop
        self._orders: queue.SimpleQueue[tuple[int, Within]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._left, self._within, self._losses = 0, contextlib.nullcontext(), list[Any]()

    def run(self, steps: int, within: Within) -> list[Any]:
        """Make so many steps in the context `within`, entered in the loop's thread.
        Returns their losses, and raises what the loop raised."""
        self._losses = []
        self._orders.put((steps, within))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run_loop, daemon=True)
            self._thread.start()
        if error := self._answers.get():
            raise error
        return self._losses

    def _run_loop(self) -> None:
        self._take_order()
        try:
            self._loop(self._on_step)
            raise RuntimeError("the loop has ended")
        except BaseException as error:  # it is raised again in `run`
            self._answers.put(error)

    def _on_step(self, loss: Any) -> None:
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            self._within.__exit__(None, None, None)
            self._answers.put(None)
            self._take_order()

    def _take_order(self) -> None:
        self._left, self._within = self._orders.get()
        self._within.__enter__()
