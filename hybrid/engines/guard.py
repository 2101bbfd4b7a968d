"""This module decides before each update whether a step has gone wrong, alike on all ranks.

It is there where the job has [guard]: a small exchange that waits, in every step. A step that is
held makes no update: parameters, optimizer and loss scale stay as they were, and what the forward
and backward passes changed (buffers, the residuals of PowerSGD) is put back."""

import copy
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..job.errors import RunError
from ..job.recovery import Policy
from ..job.schema import Job
from ..launch.exchange import gather_rows
from .buffers import copy_buffers, restore_buffers
from .tally import Tally


class Searched(Exception):
    """Ends a step that was made again to find its fault, before the update."""


class Guard:
    """Holds what a run knows of its last losses, and the verdict on the step that is being made.

    fault: what is wrong with it, None: nothing. policy: what becomes of it then. searching: the
    step is made again to find the fault, and `holds` ends it."""

    def __init__(self, job: Job) -> None:
        assert job.guard is not None
        self.settings = job.guard
        # Under fp16 the loss scale is there for gradients that overflow.
        self.checks_norm = job.train.precision != "fp16"
        self.losses: deque[float] = deque(maxlen=job.guard.window)  # of good steps
        self.in_a_row = 0  # bad steps until now
        self.fault: str | None = None
        self.spikes = False  # the fault is a loss that is too large
        self.policy: Policy = "skip"
        self.searching = False
        self.changes_batches: bool | None = None  # the job, in place; it is known after a step
        self._kept: list[_Kept] = []

    def begin(self, models: Sequence[nn.Module]) -> None:
        """Note what the passes of the coming step may change."""
        if not self.searching:
            self.fault = None
        self._kept = [_Kept(model) for model in models]

    def holds(self, step: int, tallies: Sequence[Tally], norms: Sequence[Any]) -> bool:
        """Tell whether a step makes no update; collective.

        tallies, norms: of each replica here, the norm of its gradients or of this rank's part."""
        if self.searching:
            raise Searched
        mine = list[float]()
        for tally, norm in zip(tallies, norms, strict=True):
            mine += [float(tally.loss_sum or 0.0), float(tally.count or 0.0), float(norm)]
        self._judge(step, gather_rows(mine))
        if self.fault is None:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        self.policy = self.settings.on_spike if self.spikes else self.settings.non_finite
        if self.in_a_row >= self.settings.max_in_a_row and self.policy != "stop":
            self.policy = "stop"
            self.fault += f"; guard.max_in_a_row: it is bad step {self.in_a_row} in a row"
        for kept in self._kept:
            kept.put_back()
        return True

    def _judge(self, step: int, rows: Sequence[Sequence[float]]) -> None:
        """Set `fault`. rows: of each rank, loss, targets and norm of each of its replicas."""
        sums, counts, norms = ([x for row in rows for x in row[part::3]] for part in range(3))
        targets = sum(counts)
        loss = sum(sums) / targets if targets else math.nan
        self.spikes = False
        if not math.isfinite(loss):
            apart = [i for i, row in enumerate(rows) if not all(map(math.isfinite, row[::3]))]
            whose = f" of rank {', '.join(map(str, apart))}" if apart and len(rows) > 1 else ""
            none = "" if targets else ": no target of this batch counts"
            self.fault = f"loss {loss}{whose}: not finite{none}"
        elif self.checks_norm and not all(map(math.isfinite, norms)):
            worst = next(norm for norm in norms if not math.isfinite(norm))
            self.fault = f"loss {loss:.6g}, gradient norm {worst}: not finite"
        else:
            self._judge_height(step, loss)

    def _judge_height(self, step: int, loss: float) -> None:
        """Tell a spike from a good loss, which is kept."""
        factor, window = self.settings.spike_factor, self.settings.window
        if factor and len(self.losses) == window:
            usual = statistics.median(self.losses)
            if usual <= 0:
                raise RunError(
                    f"step {step}: guard.spike_factor = {factor:g}: the median of the last "
                    f"{window} losses is {usual:.6g}; a factor is of losses above 0"
                )
            if loss > factor * usual:
                self.spikes = True
                self.fault = (
                    f"loss {loss:.6g}: a spike, {loss / usual:.3g} times {usual:.6g}, the median "
                    f"of the last {window}"
                )
                return
        self.losses.append(loss)

    @property
    def rolls_back(self) -> bool:
        """Tell whether the run is to go back to its newest checkpoint after this step."""
        return self.fault is not None and self.policy == "roll_back"

    def state(self) -> dict[str, Any]:
        """Return what a run that goes on must know, as JSON."""
        return {"losses": list(self.losses), "in_a_row": self.in_a_row}

    def set_state(self, state: Mapping[str, Any], keep_count: bool = False) -> None:
        """Take over what `state` returned, nothing of a run that had no guard.

        keep_count: of the bad steps in a row."""
        self.losses.clear()
        self.losses.extend(state.get("losses", []))
        if not keep_count:
            self.in_a_row = state.get("in_a_row", 0)


class _Kept:
    """Holds what a model had before a step that its passes may change."""

    def __init__(self, model: Any) -> None:
        self.model, self.buffers = model, copy_buffers(model)
        hooks = getattr(model, "_comm_hooks", [])
        self.residuals = [(s, _copy_slots(s)) for _, s in hooks if hasattr(s, "error_dict")]

    def put_back(self) -> None:
        restore_buffers(self.model, self.buffers)
        for state, slots in self.residuals:
            for name, value in slots.items():
                setattr(state, name, value)


def _copy_slots(state: Any) -> dict[str, Any]:
    """Copy what a hook such as PowerSGD's keeps from step to step (its errors, its factors)."""
    names = (name for name in state.__slots__ if name != "process_group")
    return {name: copy.deepcopy(getattr(state, name)) for name in names}


def is_held(engine: Any, *norms: torch.Tensor | float) -> bool:
    """Tell whether the guard holds this step's update back; collective where the engine has one.

    norms: of the gradients, or of this rank's part of them, for each replica in this process."""
    guard: Guard | None = engine.guard
    return guard is not None and guard.holds(engine.step, engine.tallies, norms)


def step_unless(optimizer: torch.optim.Optimizer, holds: Callable[[], bool]) -> None:
    """Make an optimizer ask `holds()` before each step, and make none where that is true."""
    original = optimizer.step

    def step(*arguments: Any, **options: Any) -> Any:
        return None if holds() else original(*arguments, **options)

    optimizer.step = step  # type: ignore[method-assign]
