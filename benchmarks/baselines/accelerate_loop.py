"""The loop of Accelerate's documentation: `accumulate`, `backward`, `clip_grad_norm_`.

On a host without a GPU Accelerate 1.15 turns FSDP into DDP and says nothing, though its FSDP2 runs
there: `keep_fsdp` sets it back. With several stages there is no such loop.
"""

import os
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from .workloads import Workload, due_once_in, read

STRATEGIES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


def make(workload: Workload, reads: int = 0) -> Callable[[], Any]:
    """Return a function that makes one optimizer step and returns its losses.
    reads: once in so many steps it also takes the gradient norm, and reads that and the loss as
    numbers; 0: never."""
    layers = workload.layers()
    accelerator = make_accelerator(workload, layers)
    model: Any = nn.Sequential(*layers)
    optimizer: Any = workload.optimizer(model.parameters())
    schedule = workload.schedule(optimizer)  # not prepared: that would move it once a process
    model, optimizer = accelerator.prepare(model, optimizer)
    next_batches, clip_norm = workload.micro_batches(), workload.clip_norm
    model.train()
    dues = due_once_in(reads)

    def step() -> Any:
        due = next(dues)
        losses, norm = [], 0.0
        for inputs, targets in next_batches():
            with accelerator.accumulate(model):
                loss = workload.loss(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients and (clip_norm or due):
                    norm = accelerator.clip_grad_norm_(model.parameters(), clip_norm or 1e9)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss)
        if schedule:
            schedule.step()
        return read(losses, norm) if due else losses

    return step


def make_accelerator(workload: Workload, layers: list[nn.Module]) -> Any:
    """Return an Accelerator for the strategy."""
    options: dict[str, Any] = {"gradient_accumulation_steps": workload.accumulation}
    if workload.strategy.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` does
        config = workload.deepspeed_config(int(workload.strategy.removeprefix("zero")))
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        return Accelerator(deepspeed_plugin=plugin, **options)
    if workload.strategy == "fsdp":
        units = layers[1:-1] if workload.name == "gpt" else layers  # tied ends: the root's unit
        wrapped = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=sorted({type(unit).__name__ for unit in units}),
            cpu_ram_efficient_loading=False,
        )
        return keep_fsdp(Accelerator(cpu=True, fsdp_plugin=wrapped, **options), wrapped)
    return Accelerator(cpu=True, **options)


def keep_fsdp(accelerator: Any, plugin: Any) -> Any:
    """Make Accelerate keep the FSDP2 that it was asked for."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator
