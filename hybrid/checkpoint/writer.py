"""Writes checkpoints in a thread beside the training, one at a time.

The threads of all ranks exchange what `save` needs over a gloo group of their own, so that it never
mixes with what the training sends. They touch no GPU and no other group. They ask the group's
backend and not `torch.distributed`, since the training may meanwhile start or stop the collective
counter: torch's dispatcher reads its kernels without a lock, and a call by one thread while another
one changes them crashes, or runs freed memory."""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..job.errors import RunError
from ..launch.exchange import gather_by
from ..launch.process_group import keep_timeout
from ..launch.waiting import stand_aside, thread_waits, waiting
from .save import StateHashes

LOOK_S = 0.005  # between looks at whether the thread is done
PATIENCE_S = 2.0  # for a checkpoint that is nearly written when the run fails
_open: "weakref.WeakSet[Writer]" = weakref.WeakSet()


class Writer:
    """Does one save after the other in a thread. Making it is collective.

    timeout_s: after which a rank stops waiting for another one."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size = world_size
        timeout = timedelta(seconds=timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
        keep_timeout(group)
        self._backend: Any = group and group._get_backend(torch.device("cpu"))
        self._thread: threading.Thread | None = None
        self._saved: StateHashes | None = None
        self._error: BaseException | None = None
        self._closed = False
        self._copied = threading.Event()  # what the thread copies first, which training changes
        self._copied.set()
        _open.add(self)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value; for the thread alone."""
        if self._backend is None:
            return [value]
        return gather_by(self._all_gather, value, torch.device("cpu"))

    def _all_gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's tensor; all have the same shape.

        A thread that waits inside gloo cannot be ended, and would abort the process if its peers
        went away while the interpreter ends. So it looks instead."""
        found = [torch.empty_like(mine) for _ in range(self.world_size)]
        work = self._backend.allgather([found], [mine])
        with waiting("a checkpoint"):
            while not work.is_completed():
                if self._closed:
                    raise RunError("the run has ended")
                time.sleep(LOOK_S)
            work.wait()
        return found

    def start(
        self, work: Callable[[], StateHashes | None], copy: Callable[[], None] = lambda: None
    ) -> None:
        """Begin a save, or what prepares one, after the one before has been waited for.

        copy: comes first; `wait_for_copy` waits for it."""
        if self._thread is not None:
            raise RunError("a checkpoint is still being written")
        self._saved = None
        # The interpreter ends without waiting for it where a run has failed.
        thread = threading.Thread(target=self._run, args=(work, copy), name="save", daemon=True)
        self._copied.clear()
        try:
            thread.start()
        except BaseException:
            self._copied.set()  # or a later step would wait for ever
            raise
        self._thread = thread

    def _run(self, work: Callable[[], StateHashes | None], copy: Callable[[], None]) -> None:
        try:
            stand_aside()
            copy()
            self._copied.set()
            self._saved = work()
        except BaseException as error:
            self._error = error
        finally:
            self._copied.set()

    def wait_for_copy(self) -> None:
        """Wait until the thread has copied what training is about to change."""
        self._copied.wait()

    def take(self, wait: bool) -> StateHashes | None:
        """Return what has been saved since the last call, and raise what has gone wrong.

        wait: until the thread is done; left out, None is returned while it is not."""
        if self._thread is None:
            return None
        while wait and self._thread.is_alive():
            # The rank waits for others where this thread does, and not while it writes.
            with waiting("a checkpoint") if thread_waits(self._thread) else nullcontext():
                time.sleep(LOOK_S)
        if self._thread.is_alive():
            return None
        self._thread = None
        if self._error is not None:
            raise self._error
        return self._saved

    def close(self) -> None:
        """Give a save that is still being written a moment to end."""
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
            self._closed = True
            self._thread.join(20 * LOOK_S)
        _open.discard(self)


def end_writers() -> None:
    """End the threads of this process that write, as after an error."""
    for writer in list(_open):
        writer.close()
