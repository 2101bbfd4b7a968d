"""DeepSpeed's start in a process, its complete configuration, and its fp32 master weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..job.schema import Job
from ..launch.ops_cache import remove_stale_locks, set_ops_folder
from ..launch.placement import OWN, Placement
from ..layout import micro_batch_size
from ..models.layers import Layers
from .deepspeed_config import load_ds_config
from .precision import Stepped, deepspeed_keys, name_of

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")


def prepare_process(placement: Placement) -> None:
    """Bring DeepSpeed into the process group that there is.

    On CPUs it would first compile a shared-memory all-reduce (20 to 80 s, and a killed build leaves
    a lock that stops every later start); gloo does that work, where it can be counted. To ask it
    which ops this machine can compile would run the compiler for each (0.2 s a rank), so what
    builds the op is replaced. test_workarounds.py tells when this can go.
    """
    set_ops_folder()
    if placement.launcher != OWN and placement.local_rank == 0:
        remove_stale_locks()  # else the process that started the ranks has done so
    import deepspeed

    # By this name, since the attribute `deepspeed.comm.torch` is torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(placement.backend, verbose=False)


def full_config(
    job: Job, placement: Placement, layers: Layers, name: str, path: str | None, stage: int
) -> dict[str, Any]:
    """DeepSpeed's whole configuration: the file's keys and the job's.

    Buckets are memory on top of the model (DeepSpeed's default of 5e8 elements is 2 GB live), so
    they are cut to a small part of it. Leaving `gradient_clipping` out would not be off: Accelerate
    fills in 1.0.
    """
    config = load_ds_config(path or name, stage)
    micro_batches, dp = job.micro_batches(name), placement.layout.dp
    size = micro_batch_size(job.train.global_batch, dp, micro_batches)
    elements = sum(p.numel() for p in layers.names())
    zero = config.setdefault("zero_optimization", {})
    if pipeline_stage(job, stage) != stage:
        zero |= {"stage": 1, **dict.fromkeys(BUCKETS, elements)}
    limits = _limits(layers)
    zero |= {key: min(zero[key], limits[key]) for key in zero.keys() & limits.keys()}
    return (
        config
        | deepspeed_keys(job.train.precision)
        | {
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": micro_batches,
            "train_batch_size": size * micro_batches * dp,
            "gradient_clipping": job.train.clip_norm,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
    )


def _limits(layers: Layers) -> dict[str, int]:
    """Elements that DeepSpeed may hold beside its shards: buckets of a sixteenth of the model, but
    not of less than a MiB, and gathered parameters of two layers, as FSDP holds them."""
    elements, largest = sum(p.numel() for p in layers.names()), max(layers.sizes())
    bucket = max(elements // 16, 2**18)
    return {
        **dict.fromkeys(BUCKETS, bucket + bucket % 2),  # DeepSpeed wants it even
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,
    }


def pipeline_stage(job: Job, zero_stage: int) -> int:
    """The ZeRO stage that a run asks DeepSpeed for. Only ZeRO-1 sums the gradients of rounded
    parameters in fp32; over a single column it shards nothing, so a pipeline in bf16 or fp16 is
    run under it."""
    return zero_stage if job.train.precision == "fp32" else max(1, zero_stage)


def add_biases_before_rounding() -> None:
    """Have ZeRO-3's own linear function, whose graph keeps no gathered weights as that of torch's
    does, compute what torch's does: it adds biases to rounded products, where small ones are lost
    in bf16 (losses part by 1e-3 from the second step on)."""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    def forward(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        return torch._C._nn.linear(input, weight, bias)

    LinearFunctionForZeroStage3.forward = staticmethod(forward)


def stepped(optimizer: Any) -> Stepped:
    """What one of DeepSpeed's optimizers drives."""
    summed = getattr(optimizer, "grad_acc_dtype", None) or optimizer.gradient_accumulation_dtype
    inner = optimizer.optimizer
    return Stepped(inner, fp32_partitions(optimizer), name_of(summed))


def fp32_partitions(optimizer: Any) -> list[torch.Tensor]:
    """This rank's fp32 partitions: each of DeepSpeed's optimizers has another name for them."""
    names = (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 in bf16
    )
    return list(next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)))


def restore_fp32_masters(model: nn.Module, precision: str) -> Callable[[], None]:
    """To be called before DeepSpeed takes the model; what it returns, afterwards.

    DeepSpeed rounds the parameters first and makes its fp32 master weights from the rounded ones;
    this puts the fp32 values that the job starts from into them.
    """
    if precision == "fp32":
        return lambda: None
    start = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    def restore() -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        for parameter, value in start.items():
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        start.clear()

    return restore


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A whole copy, on the CPU, of a parameter's fp32 master weight, or of a parameter or buffer
    that has none; collective over the ranks that share it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
    if master is not None:
        return master.detach().cpu().clone()
    with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
        return tensor.detach().cpu().clone()


def set_masters(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Put full fp32 values into the master weights of parameters that have some."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, tensor in tensors.items():
        if tensor.requires_grad:
            safe_set_full_fp32_param(tensor, state[name].to(tensor.device, torch.float32))
