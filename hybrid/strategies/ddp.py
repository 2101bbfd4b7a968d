"""This strategy is DDP through Accelerate: replicas average their gradients in every step.

Li et al. 2020, https://arxiv.org/abs/2006.15704. A communication hook may compress the gradients.
Such a run does not compute what `single` does: its parity has a wider tolerance, which is stated.
"""

from typing import Any

from ..engines.protocol import make_receipt
from ..job.schema import Job
from ..launch.placement import Placement
from ..layout import Layout
from ..records import Receipt
from .protocol import Engine, Layers, Loss

name = "ddp"
summary = "replicas; gradients averaged every step; hooks none, bf16, fp16, powersgd"
modules = (
    "accelerate",
    "hybrid.engines.accelerated",
    "torch.distributed.algorithms.ddp_comm_hooks",
)


def layout(job: Job, nproc: int) -> Layout:
    """Make all processes replicas."""
    return Layout(dp=nproc, replicate=nproc)


def build(job: Job, placement: Placement, layers: Layers, loss: Loss) -> Engine:
    """Put the model under DDP."""
    from ..engines.accelerated import AcceleratedEngine
    from ..engines.accelerator import prepare_ddp
    from ..engines.state import copy_state, named_tensors

    return AcceleratedEngine(
        job,
        placement,
        loss,
        prepare_ddp(job, placement, layers, job.micro_batches(name)),
        inspect=_inspect,
        scatter=lambda engine, state: copy_state(named_tensors(_module(engine)), state),
    )


def _module(engine: Any) -> Any:
    # `Accelerator.unwrap_model` would import deepspeed (0.3 s) to see that this is not its engine.
    return engine.model.module


def _inspect(engine: Any) -> Receipt:
    """Show DDP by its type, its process group, its hook, and each rank's samples."""
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
