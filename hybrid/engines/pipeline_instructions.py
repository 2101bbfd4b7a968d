"""Makes a DeepSpeed pipeline engine, which `_stages.py` drives, and replaces those of its
instructions that do not do what is meant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..job.schema import Job
from ..launch.placement import Placement
from .deepspeed_setup import restore_fp32_masters


def make_pipeline(
    job: Job,
    placement: Placement,
    stage: nn.Module,
    loss: Callable[..., Any],
    config: dict[str, Any],
    optimizer: torch.optim.Optimizer,
) -> Any:
    """A `PipelineEngine` in which this rank's stage is one module, stepped by `optimizer`.

    DeepSpeed is given a list of `pp` modules, ours at this rank's place and empty ones elsewhere
    (it keeps the whole list alive), and cuts it into as many stages; the cut was made before.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    layout, here = placement.layout, placement.stage
    module = PipelineModule(
        [stage if i == here else nn.Identity() for i in range(layout.pp)],
        topology=PipeDataParallelTopology(num_pp=layout.pp, num_dp=layout.dp),
        loss_fn=loss,
        partition_method="uniform",
    )
    restore = restore_fp32_masters(module, job.train.precision)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    restore()
    return engine


def tie(engine: Any, tied: Sequence[tuple[nn.Parameter, Any, bool]]) -> None:
    """Tell a pipeline engine of this rank's parameters that other stages hold as well.

    Each comes with the process group of its holders, in which its gradients are summed once a step,
    and with whether this rank is its first holder, the one that counts it in norms.
    """
    from deepspeed.runtime.pipe import schedule

    for parameter, _, first in tied:
        parameter.ds_pipe_replicated = not first  # type: ignore[attr-defined]

    def reduce(live: Any) -> None:
        for parameter, group, _ in tied:
            # DeepSpeed's own reduction takes `grad`, which holds the last micro-batch alone where
            # gradients are summed elsewhere, in fp32.
            held = ("_hp_grad", "grad_accum", "grad")
            found = (getattr(parameter, name, None) for name in held)
            torch.distributed.all_reduce(next(g for g in found if g is not None), group=group)

    _replace_instruction(engine, schedule.ReduceTiedGrads, lambda live, original: reduce(live))


def wrap_optimizer_step(engine: Any, before: Callable[[Any], None]) -> None:
    """Have a pipeline engine call `before(engine)` between reducing gradients and its step."""
    from deepspeed.runtime.pipe import schedule

    def step(live: Any, original: Callable[[], None]) -> None:
        before(live)
        original()

    _replace_instruction(engine, schedule.OptimizerStep, step)


def reduce_in_buckets(engine: Any) -> None:
    """Have a pipeline engine without ZeRO reduce its gradients in buckets of `reduce_bucket_size`:
    DeepSpeed takes 5e8 elements there, a second copy of all gradients, over a single column too."""
    from deepspeed.runtime.pipe import schedule

    def reduce(live: Any, original: Callable[[], None]) -> None:
        live._force_grad_boundary = True
        live.allreduce_gradients(bucket_size=live.zero_reduce_bucket_size())
        live._force_grad_boundary = False

    _replace_instruction(engine, schedule.ReduceGrads, reduce)


def _replace_instruction(
    engine: Any, instruction: type, run: Callable[[Any, Callable[[], None]], None]
) -> None:
    original = engine._INSTRUCTION_MAP[instruction]

    def replaced(live: Any, **arguments: Any) -> None:
        run(live, lambda: original(live, **arguments))

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, instruction: replaced}
