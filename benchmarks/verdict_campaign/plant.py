"""Knows, in a rank that carries a fault, which step runs and whether the fault acts in it."""

from __future__ import annotations

from typing import Any

from hybrid.engines.base import BaseEngine

from .kinds import Fault


class Plant:
    """Watches the engine's steps. There is one in a process.

    `calls` counts how often the layer that was changed has run in this training step."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.calls = fault, 0
        self.engine: Any = None
        start = BaseEngine.start_step

        def watched(engine: Any, *arguments: Any, **options: Any) -> None:
            self.engine, self.calls = engine, 0
            start(engine, *arguments, **options)

        BaseEngine.start_step = watched  # type: ignore[method-assign]

    def acts(self) -> bool:
        """Tell whether the fault acts in the step that runs; before the first step it does not."""
        if self.engine is None:
            return False
        step = self.engine.step
        return step == self.fault.step if self.fault.once else step >= self.fault.step

    def is_here(self) -> bool:
        """Tell whether this rank is the one data-parallel rank that is wrong; alone, it is."""
        placement = self.engine.placement
        return placement.layout.dp == 1 or placement.dp_rank == 1

    def is_last_stage(self) -> bool:
        """Tell whether this rank has the last stage, or without stages whether it `is_here`."""
        layout = self.engine.layout
        return self.engine.placement.stage == layout.pp - 1 if layout.pp > 1 else self.is_here()

    def num_micro_batches(self) -> int:
        """Return how many micro-batches a rank computes in a step."""
        count: int = self.engine.job.micro_batches(self.fault.strategy)
        return count
