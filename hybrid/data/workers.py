"""This module loads the micro-batches of coming steps in other processes, by torch's DataLoader.

`BatchPlan` still says which samples a step has, so the number of workers changes no batch. A worker
makes whole steps, in the order of the steps: the n-th worker every n-th. It ends with its rank."""

import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import secrets
import sys
import traceback
import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from ..job.errors import RunError
from ..launch.orphans import end_with_parent
from .loader import MicroBatch
from .steps import StepLoader

AHEAD = 2  # steps that each worker loads ahead; torch's own default

_open: "weakref.WeakSet[WorkerLoader]" = weakref.WeakSet()


class WorkerLoader:
    """Loads the steps in order, each one time, while earlier ones are computed.

    alone: what loads a step in one process. steps: the numbers of all steps. pin: of a GPU's
    batches, which are copied from pinned memory."""

    def __init__(self, alone: StepLoader, steps: range, workers: int, pin: bool) -> None:
        self.workers, self._coming = workers, iter(steps)
        forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform == "linux"
        loader = DataLoader(
            _Steps(alone),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            pin_memory=pin,
            worker_init_fn=functools.partial(_begin, os.getpid()),
            multiprocessing_context="fork" if forks else None,
            generator=torch.Generator(),  # else it would draw from the process's own
        )
        self._iterator: Any = iter(loader)
        _open.add(self)

    def step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of the next step, which must be `step`.

        Raises RunError where a worker failed or ended."""
        if step != next(self._coming, None):
            raise ValueError(f"step {step} is not the next one of those that workers load")
        try:
            found = next(self._iterator)
        except RuntimeError as error:  # torch's, for a worker that was killed
            raise RunError(
                f"data.workers = {self.workers}: a worker ended while it loaded data: {error}"
            ) from error
        if isinstance(found, _Failed):
            raise found.error()
        return found

    def close(self) -> None:
        """End the workers."""
        self._iterator = None  # torch ends them with their iterator
        _open.discard(self)


def end_workers() -> None:
    """End the workers of all loaders of this process, as after an error."""
    for loader in list(_open):
        loader.close()


@dataclasses.dataclass
class _Failed:
    """Holds an error of a worker: what it says, and its traceback for the log."""

    message: str
    details: str

    def error(self) -> RunError:
        error = RunError(self.message)
        error.add_note(f"in a worker that loads data:\n{self.details}")
        return error


class _Steps(Dataset[Any]):
    """Gives a step's micro-batches, or the error in loading them, to torch's worker."""

    def __init__(self, alone: StepLoader) -> None:
        self.alone = alone

    def __getitem__(self, step: int) -> list[MicroBatch] | _Failed:
        try:
            return [_portable(micro_batch) for micro_batch in self.alone.step_alone(step)]
        except Exception as error:
            known = isinstance(error, RunError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            return _Failed(message, traceback.format_exc())


def _portable(micro_batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch that another process can take.

    What cannot be pickled fails here, since torch would print that and wait forever."""
    parts = micro_batch.input, micro_batch.target
    pickle.dumps(tree_map(lambda _: None, parts))
    inputs, target = tree_map(lambda t: t if t is None else t.detach(), parts)
    return dataclasses.replace(micro_batch, input=inputs, target=target)


def _as_it_is(step: Any) -> Any:
    return step


def _begin(rank: int, worker: int) -> None:
    """Have a worker end with its rank at once; torch's own workers look every 5 seconds.

    The socket by which it hands over its tensors gets no name in the temporary folder, where it
    would stay when the worker is killed (unix(7), abstract sockets)."""
    if sys.platform == "linux":
        end_with_parent(rank)
        connections: Any = multiprocessing.connection
        connections.arbitrary_address = lambda family: f"\0hybrid-{secrets.token_hex(16)}"
