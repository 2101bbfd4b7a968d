"""Lists the rows of each strategy, and lets them take turns in one process."""

import collections
import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from torch.distributed.pipelining import stage as pipelining

from .driven import Driven, Within
from .workloads import LOG_EVERY, Workload

FILES = {  # unlike their names
    **dict.fromkeys(("zero1", "zero2", "zero3"), "zero"),
    "2d": "two_d",
    "pipeline_torch": "torch_pipelining",
}
STATES = ("PartialState", "AcceleratorState", "GradientState")
REPLACED = ("map_debug_info", "flatten_args")  # of torch's pipelines, by hybrid
FUNCTIONS = {name: getattr(pipelining, name) for name in REPLACED}


@dataclasses.dataclass(frozen=True)
class Row:
    """Names one row: its module, and the row that its losses and its cost are held against.

    kind: raw, hybrid or peer. loading: see `Workload`. reads: one in so many steps reads its loss
    and gradient norm, 0: none; a number over 1 is for modules that use `due_once_in`. plain: the
    hand-written loop with the same data that reads nothing, against which calls are counted.
    period: the steps after which its calls repeat."""

    name: str
    module: str
    base: str
    kind: str
    loading: str = ""
    reads: int = 0
    plain: str = "raw"
    period: int = 1


def rows_of(strategy: str, more: list[str]) -> list[Row]:
    """List the rows of a strategy; `more` are modules with a `make` of their own."""
    raw, here = f"{__package__}.{FILES.get(strategy, strategy)}", __package__
    engine, loop = f"{here}.hybrid_engine", f"{here}.hybrid_loop"
    data: dict[str, Any] = {"loading": "index", "plain": "raw_loads"}
    loader: dict[str, Any] = {"loading": "dataloader", "plain": "raw_dataloader"}
    logs: dict[str, Any] = {"reads": LOG_EVERY, "period": LOG_EVERY}
    return [
        Row("raw", raw, "raw", "raw"),
        Row("raw_again", raw, "raw", "raw"),
        Row("raw_reads", raw, "raw", "raw", reads=1),
        Row("raw_loads", raw, "raw_loads", "raw", **data),
        Row("raw_dataloader", raw, "raw_loads", "raw", **loader),
        Row("engine", engine, "raw", "hybrid", period=LOG_EVERY),
        Row("engine_reads", engine, "raw_reads", "hybrid", reads=1),
        Row("loop", loop, "raw_loads", "hybrid", **data, period=LOG_EVERY),
        Row("loop_reads", loop, "raw_loads", "hybrid", **data, reads=1),
        Row("accelerate", f"{here}.accelerate_loop", "raw", "peer"),
        Row("fabric", f"{here}.fabric", "raw", "peer"),
        Row("accelerate_logs", f"{here}.accelerate_loop", "raw", "peer", **logs),
        Row("fabric_logs", f"{here}.fabric", "raw", "peer", **logs),
        Row("trainer", f"{here}.trainer", "raw_dataloader", "peer", **loader),
        Row("torch_pipelining", f"{here}.torch_pipelining", "raw", "peer"),
        Row("torch_pipelining_logs", f"{here}.torch_pipelining", "raw", "peer", **logs),
        *(Row(module, module, "raw", "peer") for module in more),
    ]


class Skipped(Exception):
    """Says why a row cannot run here, which is no failure."""


class Turn:
    """Runs one row, with what processes share kept apart from other rows.

    Accelerate has one state for all its objects, and it and hybrid set environment variables: each
    row finds them as it left them, and none at first. Of torch's functions, each row has those that
    it put in their place."""

    def __init__(self, row: Row, workload: Workload) -> None:
        self.row = row
        self.workload = dataclasses.replace(workload, loading=row.loading)
        self._states: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        self._environment = dict(os.environ)
        self._functions = FUNCTIONS
        self._step: Any = None

    def build(self) -> None:
        """Make the row's model, optimizer and loop; raises Skipped where it cannot run."""
        with self._apart():
            try:
                module = importlib.import_module(self.row.module)
            except ImportError as error:
                if self.row.kind != "peer":
                    raise
                raise Skipped(f"not installed: {error}") from None
            strategies = getattr(module, "STRATEGIES", (self.workload.strategy,))
            if self.workload.strategy not in strategies:
                raise Skipped("does not offer this strategy here")
            self._step = module.make(self.workload, self.row.reads)

    def run(self, steps: int, within: Within | None = None) -> list[Any]:
        """Make so many steps in a context, and return what they returned."""
        within = within or contextlib.nullcontext()
        with self._apart():
            if isinstance(self._step, Driven):
                return self._step.run(steps, within)
            step = self._step
            with within:
                return [step() for _ in range(steps)]

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        others = dict(os.environ)
        _set_environment(self._environment)
        _set_torch_functions(self._functions)
        for name, state in _accelerate_states().items():
            state.clear()
            state.update(self._states[name])
        try:
            yield
        finally:
            self._states.update((n, dict(state)) for n, state in _accelerate_states().items())
            self._environment = dict(os.environ)
            self._functions = _torch_functions()
            _set_environment(others)


def _accelerate_states() -> dict[str, dict[str, Any]]:
    module = sys.modules.get("accelerate.state")
    return {name: getattr(module, name)._shared_state for name in STATES} if module else {}


def _torch_functions() -> dict[str, Any]:
    return {name: getattr(pipelining, name) for name in REPLACED}


def _set_torch_functions(functions: dict[str, Any]) -> None:
    for name, function in functions.items():
        setattr(pipelining, name, function)


def _set_environment(wanted: dict[str, str]) -> None:
    for key in os.environ.keys() - wanted.keys():
        del os.environ[key]
    for key, value in wanted.items():
        if os.environ.get(key) != value:
            os.environ[key] = value
