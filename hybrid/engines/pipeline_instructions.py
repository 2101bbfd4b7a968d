"""This module makes DeepSpeed's pipeline engine for `pipeline_deepspeed`.

It replaces those of the engine's instructions that do something else than is meant, and leaves out
what a step does for nothing."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..job.schema import Job
from ..launch.placement import Placement
from .deepspeed_setup import link_reordered, restore_fp32_masters


def make_pipeline(
    job: Job,
    placement: Placement,
    stage: nn.Module,
    loss: Callable[..., Any],
    config: dict[str, Any],
    optimizer: torch.optim.Optimizer,
) -> Any:
    """Make a `PipelineEngine` in which this rank's stage is one module, stepped by `optimizer`.

    DeepSpeed is given a list of `pp` modules, ours at this rank's place and empty ones elsewhere
    (it keeps the whole list alive), and cuts it into as many stages. The model was cut before."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
    from deepspeed.utils.timer import NoopTimer

    layout, here = placement.layout, placement.stage
    module = PipelineModule(
        [stage if i == here else nn.Identity() for i in range(layout.pp)],
        topology=PipeDataParallelTopology(num_pp=layout.pp, num_dp=layout.dp),
        loss_fn=lambda output, _: loss(output),  # the labels are those of empty batches
        partition_method="uniform",
    )
    restore = restore_fp32_masters(module, job.train.precision, placement)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    link_reordered(engine.optimizer)
    restore(engine.grid.get_data_parallel_group())
    engine.__class__ = _sparing_class()
    engine.timers = NoopTimer()  # else it notes each step's time in a list that nobody reads
    return engine


@functools.cache
def _sparing_class() -> type:
    """Return DeepSpeed's pipeline engine without what each of its steps does for nothing here.

    It sends the loss from the last stage to all others and waits for it, which the row of a step
    does later; makes the same schedule anew; reads torch's version as text at every transfer; and
    asks of each of its attributes whether it is a parameter. test_workarounds.py tells when
    DeepSpeed has stopped doing so; benchmarks/LOG_PIPELINES.md says what it took."""
    from deepspeed.runtime.pipe import engine, p2p

    p2p.can_send_recv = functools.cache(p2p.can_send_recv)

    class PipelineEngine(engine.PipelineEngine):
        def _aggregate_total_loss(self) -> Any:
            return super()._aggregate_total_loss() if self.monitor.enabled else None

        def _train_schedule(self) -> Any:
            if "_schedule" not in self.__dict__:
                self.__dict__["_schedule"] = _Repeated(super()._train_schedule())
            return self.__dict__["_schedule"]

        def __setattr__(self, name: str, value: Any) -> None:
            if name in self.__dict__ and not isinstance(value, (torch.Tensor, nn.Module)):
                self.__dict__[name] = value
            else:
                super().__setattr__(name, value)

    return PipelineEngine


class _Repeated(list[Any]):
    """Holds the steps of a DeepSpeed schedule, to be run again."""

    def __init__(self, schedule: Any) -> None:
        super().__init__(schedule)
        self.num_pipe_buffers = schedule.num_pipe_buffers


@contextlib.contextmanager
def unmonitored(engine: Any) -> Iterator[None]:
    """Keep a pipeline engine's monitor out of an evaluation, as other strategies do.

    It would broadcast and write one number a call, where the run asks for each micro-batch's."""
    engine.monitor, monitor = SimpleNamespace(enabled=False), engine.monitor
    try:
        yield
    finally:
        engine.monitor = monitor


def tie(engine: Any, tied: Sequence[tuple[nn.Parameter, Any, bool]]) -> None:
    """Tell a pipeline engine which of this rank's parameters other stages hold as well.

    Each comes with the process group of its holders, in which its gradients are summed once a step,
    and with whether this rank is its first holder, which counts it in norms."""
    for parameter, _, first in tied:
        parameter.ds_pipe_replicated = not first  # type: ignore[attr-defined]

    def reduce(live: Any, original: Callable[[], None]) -> None:
        for parameter, group, _ in tied:
            # DeepSpeed's own reduction takes `grad`, which has only the last micro-batch where
            # gradients are summed elsewhere, in fp32.
            held = ("_hp_grad", "grad_accum", "grad")
            found = (getattr(parameter, name, None) for name in held)
            torch.distributed.all_reduce(next(g for g in found if g is not None), group=group)

    _replace_instruction(engine, "ReduceTiedGrads", reduce)


def wrap_optimizer_step(engine: Any, before: Callable[[Any], None]) -> None:
    """Make a pipeline engine call `before(engine)` between reducing gradients and its step."""

    def step(live: Any, original: Callable[[], None]) -> None:
        before(live)
        original()

    _replace_instruction(engine, "OptimizerStep", step)


def reduce_in_buckets(engine: Any) -> None:
    """Make a pipeline engine without ZeRO reduce its gradients in buckets of `reduce_bucket_size`.

    By itself DeepSpeed takes 5e8 elements, which is a second copy of all gradients, over a single
    column too, which has nobody to reduce with."""

    def reduce(live: Any, original: Callable[[], None]) -> None:
        if live.dp_world_size == 1:
            return
        live._force_grad_boundary = True
        live.allreduce_gradients(bucket_size=live.zero_reduce_bucket_size())
        live._force_grad_boundary = False

    _replace_instruction(engine, "ReduceGrads", reduce)


def _replace_instruction(
    engine: Any, name: str, run: Callable[[Any, Callable[[], None]], None]
) -> None:
    """Make an engine call `run(engine, original)` for the instruction of this name."""
    from deepspeed.runtime.pipe import schedule

    instruction = getattr(schedule, name)
    original = engine._INSTRUCTION_MAP[instruction]

    def replaced(live: Any, **arguments: Any) -> None:
        run(live, lambda: original(live, **arguments))

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instruction: replaced}
