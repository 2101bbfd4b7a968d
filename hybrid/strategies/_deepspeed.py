"""DeepSpeed's configuration, its precision, ZeRO's receipts and weights. With `_pipe.py`, all that
imports DeepSpeed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .. import jit_cache
from ..config import Job
from ..launchers import Ranks
from ..layout import Layout, micro_batch_size
from ..models.layers import Layers
from ..processes import device, gather_objects
from ..records import Receipt
from . import _ds_config, _precision, _torch
from .base import make_receipt

State = dict[str, torch.Tensor]

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")


def prepare_process() -> None:
    """Bring DeepSpeed into the process group that there is.

    On CPUs it would first compile a shared-memory all-reduce (20 to 80 s, and a killed build leaves
    a lock that stops every later start); gloo does that work, where it can be counted. To ask it
    which ops this machine can compile would run the compiler for each (0.2 s a rank), so what
    builds the op is replaced. test_workarounds.py tells when this can go.
    """
    jit_cache.use()
    if "HYBRID_PARENT" not in os.environ and Ranks.from_env().local_rank == 0:
        jit_cache.mend()  # else the process that started the ranks has done so
    import deepspeed

    # By this name, since the attribute `deepspeed.comm.torch` is torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("nccl" if device().type == "cuda" else "gloo", verbose=False)


def full_config(
    job: Job, layout: Layout, layers: Layers, name: str, path: str | None, stage: int
) -> dict[str, Any]:
    """DeepSpeed's whole configuration: the file's keys and the job's.

    Buckets are memory on top of the model (DeepSpeed's default of 5e8 elements is 2 GB live), so
    they are cut to a small part of it. Leaving `gradient_clipping` out would not be off: Accelerate
    fills in 1.0.
    """
    config = _ds_config.load(path or name, stage)
    micro_batches = job.micro_batches(name)
    size = micro_batch_size(job.train.global_batch, layout.dp, micro_batches)
    elements = sum(p.numel() for p in layers.names())
    zero = config.setdefault("zero_optimization", {})
    if pipeline_stage(job, stage) != stage:
        zero |= {"stage": 1, **dict.fromkeys(BUCKETS, elements)}
    limits = _limits(layers)
    zero |= {key: min(zero[key], limits[key]) for key in zero.keys() & limits.keys()}
    return (
        config
        | _precision.deepspeed_keys(job.train.precision)
        | {
            "train_micro_batch_size_per_gpu": size,
            "gradient_accumulation_steps": micro_batches,
            "train_batch_size": size * micro_batches * layout.dp,
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


def inspect_zero(engine: Any, wanted: int) -> Receipt:
    """The stage that DeepSpeed runs, and what each rank holds of parameters and optimizer state."""
    live = engine.accelerator.deepspeed_engine_wrapped.engine
    stage = int(live.zero_optimization_stage())
    parameters = list(live.module.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
    local = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters)
    optimizer = live.optimizer
    master = sum(t.numel() for t in _masters(optimizer))
    evidence = {
        "model": type(live).__name__,
        "distributed_type": str(engine.accelerator.distributed_type),
        "zero_stage": stage,
        "optimizer": type(optimizer).__name__,
        "gradients_partitioned": stage == 3 or bool(getattr(optimizer, "partition_gradients", 0)),
        "elements_total": total,
        "parameter_elements_by_rank": gather_objects(local),
        "master_elements_by_rank": gather_objects(master),
        "sample_digest_by_rank": list(engine.digests),
    }
    n, padding = engine.layout.dp, 2 * engine.layout.dp * (len(parameters) + 1)
    held, masters = evidence["parameter_elements_by_rank"], evidence["master_elements_by_rank"]
    conditions = {
        f"DeepSpeed runs ZeRO stage {wanted}": stage == wanted,
        "fp32 parameters partitioned once over the ranks": all(
            trained <= m * n <= trained + padding * n for m in masters
        ),
        "gradients partitioned from stage 2 on": evidence["gradients_partitioned"] == (wanted > 1),
        "parameters partitioned at stage 3 only": all(
            (h * n <= total + padding * n) if wanted == 3 else h == total for h in held
        ),
    }
    return make_receipt(evidence, conditions)


def stepped(optimizer: Any) -> _precision.Stepped:
    """What one of DeepSpeed's optimizers drives."""
    summed = getattr(optimizer, "grad_acc_dtype", None) or optimizer.gradient_accumulation_dtype
    inner = optimizer.optimizer
    return _precision.Stepped(inner, _masters(optimizer), _precision.name_of(summed))


def _masters(optimizer: Any) -> list[torch.Tensor]:
    """This rank's fp32 partitions: each of DeepSpeed's optimizers has another name for them."""
    names = (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 in bf16
    )
    return list(next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)))


def keep_masters(model: nn.Module, precision: str) -> Callable[[], None]:
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


def gather_zero(engine: Any) -> State:
    """Full tensors on rank 0, gathered one by one; nothing elsewhere."""
    full = {}
    for name, tensor in _torch.named_tensors(_module(engine)).items():
        whole = full_tensor(tensor)  # collective
        if engine.accelerator.is_main_process:
            full[name] = whole
    return full


def scatter_zero(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Take over full parameters, and the optimizer's own fp32 copies with them."""
    import deepspeed

    tensors = _torch.named_tensors(_module(engine))
    partitioned = [t for t in tensors.values() if hasattr(t, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
        _torch.copy_state(tensors, state)
    set_masters(tensors, state)


def set_masters(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Put full fp32 values into the master weights of parameters that have some."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, tensor in tensors.items():
        if tensor.requires_grad:
            safe_set_full_fp32_param(tensor, state[name].to(tensor.device, torch.float32))


def _module(engine: Any) -> nn.Module:
    return engine.accelerator.deepspeed_engine_wrapped.engine.module
