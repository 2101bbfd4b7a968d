"""The one file that imports DeepSpeed: its configuration, ZeRO's receipts and weights, and the
making of a pipeline engine, which `_stages.py` drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..config import Job
from ..layout import Layout, Ranks, micro_batch_size
from ..processes import device, gather_objects
from ..records import Receipt
from . import _ds_config, _torch
from .base import make_receipt

State = dict[str, torch.Tensor]


def prepare_process() -> None:
    """Bring DeepSpeed into the process group that there is.

    On CPUs it would first compile a shared-memory all-reduce (20 to 80 s, and a killed build leaves
    a lock that stops every later start); gloo does that work, where it can be counted.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if device().type == "cuda" else "gloo", verbose=False)


def full_config(
    job: Job, layout: Layout, layers: list[nn.Module], name: str, path: str | None, stage: int
) -> dict[str, Any]:
    """DeepSpeed's whole configuration: the file's keys and the job's.

    Buckets larger than the model are memory without use (DeepSpeed's default of 5e8 elements is
    2 GB live), so they are cut to it. Leaving `gradient_clipping` out would not be off: Accelerate
    fills in 1.0.
    """
    config = _ds_config.load(path or name, stage)
    micro_batches = job.micro_batches(name)
    size = micro_batch_size(job.train.global_batch, layout.dp, micro_batches)
    elements = sum(p.numel() for layer in layers for p in layer.parameters())
    zero = config.setdefault("zero_optimization", {})
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        if bucket in zero:
            zero[bucket] = min(zero[bucket], elements + elements % 2)  # DeepSpeed wants it even
    return config | {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": size * micro_batches * layout.dp,
        "gradient_clipping": job.train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def inspect_zero(engine: Any, wanted: int) -> Receipt:
    """The stage that DeepSpeed runs, and what each rank holds of parameters and optimizer state."""
    live = engine.accelerator.deepspeed_engine_wrapped.engine
    stage = int(live.zero_optimization_stage())
    parameters = list(live.module.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    local = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters)
    optimizer = live.optimizer
    if stage == 3:
        master = sum(t.numel() for t in optimizer.fp32_partitioned_groups_flat)
    else:
        master = sum(t.numel() for t in optimizer.single_partition_of_fp32_groups)
    evidence = {
        "model": type(live).__name__,
        "distributed_type": str(engine.accelerator.distributed_type),
        "zero_stage": stage,
        "optimizer": type(optimizer).__name__,
        "gradients_partitioned": stage == 3 or bool(optimizer.partition_gradients),
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
            total <= m * n <= total + padding * n for m in masters
        ),
        "gradients partitioned from stage 2 on": evidence["gradients_partitioned"] == (wanted > 1),
        "parameters partitioned at stage 3 only": all(
            (h * n <= total + padding * n) if wanted == 3 else h == total for h in held
        ),
    }
    return make_receipt(evidence, conditions)


def gather_zero(engine: Any) -> State:
    """Full parameters; ZeRO-3's partitions are gathered one by one."""
    import deepspeed

    full: State = {}
    for name, tensor in _torch.named_tensors(_module(engine)).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            full[name] = tensor.detach().cpu().clone()
    return full


def scatter_zero(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Take over full parameters, and the optimizer's own fp32 copies with them."""
    import deepspeed

    tensors = _torch.named_tensors(_module(engine))
    partitioned = [t for t in tensors.values() if hasattr(t, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
        _torch.copy_state(tensors, state)
    engine.accelerator.deepspeed_engine_wrapped.engine.optimizer.refresh_fp32_params()


def _module(engine: Any) -> nn.Module:
    return engine.accelerator.deepspeed_engine_wrapped.engine.module


def make_pipeline(
    job: Job, layout: Layout, stage: nn.Module, loss: Callable[..., Any], config: dict[str, Any]
) -> Any:
    """A `PipelineEngine` in which this rank's stage is one module.

    DeepSpeed is given a list of `pp` modules, ours at this rank's place and empty ones elsewhere
    (it keeps the whole list alive), and cuts it into as many stages; the cut was made before.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

    here = layout.stage(Ranks.from_env().rank)
    module = PipelineModule(
        [stage if i == here else nn.Identity() for i in range(layout.pp)],
        topology=PipeDataParallelTopology(num_pp=layout.pp, num_dp=layout.dp),
        loss_fn=loss,
        partition_method="uniform",
    )
    optimizer = _torch.build_optimizer(job, module.parameters())
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def wrap_optimizer_step(engine: Any, before: Callable[[Any], None]) -> None:
    """Have a pipeline engine call `before(engine)` between reducing gradients and its step."""
    from deepspeed.runtime.pipe import schedule

    original = engine._INSTRUCTION_MAP[schedule.OptimizerStep]

    def step(live: Any, **arguments: Any) -> None:
        before(live)
        original(live, **arguments)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.OptimizerStep: step}
