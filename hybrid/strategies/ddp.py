"""DistributedDataParallel through Accelerate: replicate, average gradients every step.

Li et al. 2020, https://arxiv.org/abs/2006.15704. A communication hook may compress the gradients:
then the run is no longer `single` in other clothes, and parity has a wider tolerance, stated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..engines.protocol import Engine, make_receipt
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..records import Receipt

if TYPE_CHECKING:
    from torch import nn

    from ..models.layers import Layers
    from ..models.losses import Loss

name = "ddp"
summary = "replicas; gradients averaged every step; hooks none, bf16, fp16, powersgd"

HOOKS = {"none": "no", "bf16": "bf16", "fp16": "fp16", "powersgd": "power_sgd"}
POWERSGD_START = 2  # the first step that may compress: earlier ones size and warm up its factors


def layout(job: Job, nproc: int) -> Layout:
    """All processes are replicas."""
    return Layout(dp=nproc, replicate=nproc)


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """The model under DDP."""
    from ..engines.accelerated import AcceleratedEngine
    from ..engines.accelerator import prepare_ddp
    from ..engines.state import copy_of_state, copy_state, named_tensors

    accumulation = job.micro_batches(name)
    hook = job.strategy.ddp.comm_hook
    options: dict[str, Any] = {}
    if hook == "powersgd":
        options = {
            "matrix_approximation_rank": job.strategy.ddp.powersgd_rank,
            "start_powerSGD_iter": POWERSGD_START,
        }
    accelerator, prepared = prepare_ddp(job, placement, layers, accumulation, HOOKS[hook], options)
    return AcceleratedEngine(
        job,
        placement,
        loss,
        accelerator,
        prepared,
        inspect=_inspect,
        gather=lambda engine: copy_of_state(_module(engine)),
        scatter=lambda engine, state: copy_state(named_tensors(_module(engine)), state),
    )


def _module(engine: Any) -> nn.Module:
    return engine.accelerator.unwrap_model(engine.model)


def _inspect(engine: Any) -> Receipt:
    """DDP by type, its group's size, its hook, whole parameters on every rank, samples apart."""
    model = engine.model
    wrapped = hasattr(model, "process_group")
    hooks = [hook.__name__ for hook, _ in getattr(model, "_comm_hooks", [])]
    evidence = {
        "model": type(model).__name__,
        "distributed_type": str(engine.accelerator.distributed_type),
        "group_size": model.process_group.size() if wrapped else 1,
        "comm_hooks": hooks,
        "bucket_bytes": getattr(model, "bucket_bytes_cap", None),
        "sample_digest_by_rank": list(engine.digests),
    }
    asked = engine.job.strategy.ddp.comm_hook
    conditions = {
        "the model is a DistributedDataParallel": evidence["model"] == "DistributedDataParallel",
        f"its group has {engine.layout.dp} ranks": evidence["group_size"] == engine.layout.dp,
        f"its communication hook is {asked}": bool(hooks) == (asked != "none"),
    }
    return make_receipt(evidence, conditions)
