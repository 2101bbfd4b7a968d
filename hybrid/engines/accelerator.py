"""The one file that imports Accelerate: it prepares model and optimizer for DDP, FSDP2 and ZeRO,
and works round what Accelerate does silently on hosts without a GPU (`_keep_fsdp`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..job.schema import Job
from ..launch.placement import Placement
from ..models.layers import Layers
from .optimizer import build_optimizer, no_decay_names
from .precision import DTYPES, Observer, names_of, round_at_use


class PreparedModel(NamedTuple):
    """What `Accelerator.prepare` returned, what observes it, and its buffers' dtypes before."""

    model: nn.Module
    optimizer: Any
    observer: Observer
    buffers: str


def prepare_ddp(
    job: Job,
    placement: Placement,
    layers: Layers,
    accumulation: int,
    hook: str,
    state_options: dict[str, Any],
) -> tuple[Any, PreparedModel]:
    """The model under DistributedDataParallel, with a communication hook ("no", "bf16", "fp16",
    "power_sgd") and `strategy.ddp.bucket_cap_mb`."""
    bf16_on_cpu = hook == "bf16" and placement.device.type == "cpu"
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    handler = DistributedDataParallelKwargs(
        bucket_cap_mb=job.strategy.ddp.bucket_cap_mb,
        gradient_as_bucket_view=True,  # else the buckets hold every gradient a second time
        comm_hook=DDPCommunicationHookType("no" if bf16_on_cpu else hook),
        comm_state_option=state_options,
    )
    accelerator = _accelerator(placement, accumulation, kwargs_handlers=[handler])
    prepared = _prepare(job, accelerator, layers, rounds_at_use=True)
    if bf16_on_cpu:
        model: Any = prepared.model
        model.register_comm_hook(None, _bf16_hook())
    return accelerator, prepared


def _bf16_hook() -> Callable[..., Any]:
    """torch's bf16 hook under a name of its own: torch takes the original, by its name, on NCCL and
    XCCL only (torch/nn/parallel/distributed.py), while gloo all-reduces bf16 as well."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    def bf16_hook_on_gloo(state: Any, bucket: Any) -> Any:
        return bf16_compress_hook(state, bucket)

    bf16_hook_on_gloo.__annotations__ = dict(bf16_compress_hook.__annotations__)  # DDP reads them
    return bf16_hook_on_gloo


def prepare_fsdp(
    job: Job, placement: Placement, layers: Layers, accumulation: int
) -> tuple[Any, PreparedModel]:
    """The model under FSDP2, every layer of the flat list that has parameters of its own a unit; a
    tied one belongs to the root, whose unit has them all."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    low = DTYPES[job.train.precision]
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=job.strategy.fsdp.reshard_after_forward,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layers.unit_classes(),
        mixed_precision_policy=None if low == torch.float32 else policy,
        cpu_ram_efficient_loading=False,
    )
    accelerator = _accelerator(placement, accumulation, fsdp_plugin=plugin)
    _keep_fsdp(accelerator, plugin, placement)
    return accelerator, _prepare(job, accelerator, layers)


def prepare_zero(
    job: Job,
    placement: Placement,
    layers: Layers,
    accumulation: int,
    ds_config: dict[str, Any],
    around: Callable[[nn.Module, str], Callable[[], None]],
) -> tuple[Any, PreparedModel]:
    """The model under DeepSpeed's ZeRO, from a complete DeepSpeed configuration. `around` is called
    with the model before DeepSpeed takes it, and what it returns afterwards."""
    # Accelerate reads the variable, not its argument, to decide whether DeepSpeed runs at all, and
    # then only when it is not told that the host is a CPU (accelerate/state.py).
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate.utils import DeepSpeedPlugin

    accelerator = _accelerator(
        placement,
        accumulation,
        cpu=False,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config),
    )
    return accelerator, _prepare(job, accelerator, layers, around=around)


def _accelerator(
    placement: Placement, accumulation: int, cpu: bool | None = None, **options: Any
) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    # Accelerate keeps what the first Accelerator of a process was told, for all after it: a run
    # would be under the strategy of the run before.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    group = InitProcessGroupKwargs(backend=placement.backend)
    handlers = [group, *options.pop("kwargs_handlers", [])]
    return Accelerator(
        cpu=placement.device.type == "cpu" if cpu is None else cpu,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=handlers,
        mixed_precision="no",
        **options,
    )


def _prepare(
    job: Job,
    accelerator: Any,
    layers: Layers,
    rounds_at_use: bool = False,
    around: Callable[[nn.Module, str], Callable[[], None]] | None = None,
) -> PreparedModel:
    observer = Observer(layers)
    no_decay = no_decay_names(layers, job.optimizer.no_decay)
    model = layers.whole()
    buffers = names_of(model.buffers())
    optimizer = build_optimizer(job, dict(model.named_parameters()), no_decay)
    if rounds_at_use:
        round_at_use(model, DTYPES[job.train.precision])
    after = around(model, job.train.precision) if around else None
    prepared = accelerator.prepare(model, optimizer)
    if after:
        after()
    return PreparedModel(prepared[0], prepared[1], observer, buffers)


def _keep_fsdp(accelerator: Any, plugin: Any, placement: Placement) -> None:
    """Make Accelerate keep the FSDP2 that it was asked for.

    On a host without a GPU its state silently becomes MULTI_CPU, that is DDP, because
    `accelerate/state.py` (1.15) grants FSDP to GPU-like types only, though its FSDP2 code runs on
    CPUs as it is. The receipt refuses a run where this did not take: a DTensor is what counts.
    test_workarounds.py tells when this can go.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = accelerator.state
    if state.distributed_type != DistributedType.FSDP:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    layout = placement.layout
    if layout.replicate > 1:
        from accelerate.parallelism_config import ParallelismConfig

        degrees = ParallelismConfig(dp_replicate_size=layout.replicate, dp_shard_size=layout.shard)
        state.parallelism_config = degrees
        state.device_mesh = degrees.build_device_mesh(placement.device.type)
