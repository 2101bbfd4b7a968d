"""This module prepares models for DDP, FSDP2 and ZeRO. No other file here imports Accelerate.

It also works round what Accelerate does silently on hosts without a GPU (`_keep_fsdp`), and in one
process on a GPU (`_keep_ddp`), and tells it which modules are FSDP2's units (`_by_object`)."""

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..job.schema import Job
from ..launch.placement import Placement
from ..models.layers import Layers
from .comm_hooks import bf16_hook, powersgd_on_gloo
from .deepspeed_setup import link_reordered, restore_fp32_masters
from .optimizer import build_optimizer, no_decay_names
from .own_optimizer import is_own
from .precision import DTYPES, Observer, names_of, round_at_use

Cut = Callable[[nn.Module, Callable[[torch.Tensor], None]], None]


class PreparedModel(NamedTuple):
    """Holds an `Accelerator` and what its `prepare` returned."""

    accelerator: Any
    model: nn.Module
    optimizer: Any
    observer: Observer
    buffers: str  # the dtypes that the model's buffers had before
    units: Sequence[nn.Module] = ()  # which FSDP2 is to shard one by one


# The names that Accelerate has for the values of `strategy.ddp.comm_hook`.
HOOKS = {"none": "no", "bf16": "bf16", "fp16": "fp16", "powersgd": "power_sgd"}
POWERSGD_START = 2  # the first step that may compress: earlier ones size and warm up its factors


def prepare_ddp(job: Job, placement: Placement, layers: Layers, accumulation: int) -> PreparedModel:
    """Put the model under DistributedDataParallel, with the settings of `strategy.ddp`."""
    settings, options = job.strategy.ddp, dict[str, Any]()
    if settings.comm_hook == "powersgd":
        options["matrix_approximation_rank"] = settings.powersgd_rank
        options["start_powerSGD_iter"] = POWERSGD_START
    own = settings.comm_hook in ("bf16", "powersgd") and placement.device.type == "cpu"
    hook = "no" if own else HOOKS[settings.comm_hook]
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    handler = DistributedDataParallelKwargs(
        bucket_cap_mb=settings.bucket_cap_mb,
        gradient_as_bucket_view=True,  # else the buckets hold every gradient a second time
        comm_hook=DDPCommunicationHookType(hook),
        comm_state_option=options,
    )
    accelerator = _make_accelerator(placement, accumulation, handler)
    prepared = _keep_ddp(_prepare(job, accelerator, layers, rounds_at_use=True), handler)
    if own:
        model: Any = prepared.model
        model.register_comm_hook(*(powersgd_on_gloo(options) if options else (None, bf16_hook())))
    return prepared


def prepare_fsdp(
    job: Job, placement: Placement, layers: Layers, accumulation: int
) -> PreparedModel:
    """Put the model under FSDP2, with a unit for each of `Layers.units`.
    What is outside them, such as layers that share a parameter, belongs to the root's unit."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    low = DTYPES[job.train.precision]
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=job.strategy.fsdp.reshard_after_forward,
        auto_wrap_policy="no_wrap",
        mixed_precision_policy=None if low == torch.float32 else policy,
        cpu_ram_efficient_loading=False,
    )
    accelerator = _make_accelerator(placement, accumulation, fsdp_plugin=plugin)
    _keep_fsdp(accelerator, plugin, placement)
    units = layers.units()
    with _by_object(units):
        return _prepare(job, accelerator, layers, sharded=True)._replace(units=units)


def prepare_zero(
    job: Job,
    placement: Placement,
    layers: Layers,
    accumulation: int,
    ds_config: dict[str, Any],
    cut: Cut | None,
) -> PreparedModel:
    """Put the model under DeepSpeed's ZeRO, by a complete DeepSpeed configuration.

    cut: cuts the parameters before DeepSpeed takes the model. It gets the model, and what keeps the
    fp32 value of each parameter before that is rounded."""
    # Accelerate decides by this variable, not by its argument, whether DeepSpeed runs at all, and
    # only where it is not told that the host is a CPU (accelerate/state.py).
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate.utils import DeepSpeedPlugin

    plugin = DeepSpeedPlugin(hf_ds_config=ds_config)
    # It would import transformers (0.9 s), only to tell `from_pretrained` of the configuration.
    plugin.set_deepspeed_weakref = lambda: None
    accelerator = _make_accelerator(placement, accumulation, cpu=False, deepspeed_plugin=plugin)
    return _prepare(job, accelerator, layers, restored_on=placement, cut=cut)


def _make_accelerator(
    placement: Placement, accumulation: int, *handlers: Any, **options: Any
) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import InitProcessGroupKwargs

    # Accelerate keeps the settings of a process's first Accelerator for all later ones: without
    # this, a run would be under the strategy of the run before.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    options.setdefault("cpu", placement.device.type == "cpu")
    return Accelerator(
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend=placement.backend), *handlers],
        mixed_precision="no",
        **options,
    )


def _prepare(
    job: Job,
    accelerator: Any,
    layers: Layers,
    rounds_at_use: bool = False,
    restored_on: Placement | None = None,
    sharded: bool = False,
    cut: Cut | None = None,
) -> PreparedModel:
    observer = Observer(layers, job.train.compile)
    no_decay = no_decay_names(layers, job.optimizer.no_decay)
    model = layers.whole()
    if not (sharded or cut):
        layers.fill(model)
    late = any(p.is_meta for p in model.parameters())  # each unit is filled when it is its turn
    buffers = names_of(model.buffers())
    optimizer = _optimizer_of(job, model, no_decay, late)
    if rounds_at_use:
        round_at_use(model, DTYPES[job.train.precision])
    restore = None
    if restored_on:  # it is DeepSpeed that takes the model
        restore = restore_fp32_masters(model, job.train.precision, restored_on)
    if cut and restore:
        cut(model, restore.keep)
        if late:
            optimizer = _optimizer_of(job, model, no_decay)
    with (
        contextlib.nullcontext() if restore else _no_deepspeed(),
        _without_state_dict() if sharded else contextlib.nullcontext(),
        _filled_first(layers) if sharded else contextlib.nullcontext(),
    ):
        live, live_optimizer = accelerator.prepare(model, optimizer)
    if restore:
        link_reordered(live.optimizer)
        restore(None)
    if (is_own(job) or late) and isinstance(next(live.parameters()), DTensor):
        # Accelerate gives an optimizer the shards in place of its parameters, but leaves what the
        # optimizer made of those when it was made, such as Adagrad's state.
        live_optimizer.optimizer = _optimizer_of(job, live, no_decay)
    return PreparedModel(accelerator, live, live_optimizer, observer, buffers)


def _optimizer_of(
    job: Job, model: nn.Module, no_decay: Collection[str], late: bool = False
) -> torch.optim.Optimizer:
    """Build the job's optimizer; late: one in its place, until the parameters have values."""
    if late:
        return torch.optim.SGD(model.parameters(), lr=job.optimizer.lr)
    return build_optimizer(job, dict(model.named_parameters()), no_decay)


@contextlib.contextmanager
def _filled_first(layers: Layers) -> Iterator[None]:
    """Give each unit its first values right before Accelerate shards it, if it has none yet."""
    from torch.distributed import fsdp

    shard = fsdp.fully_shard

    def fill_and_shard(module: Any, **options: Any) -> Any:
        for unit in module if isinstance(module, list) else [module]:
            layers.fill(unit)
        return shard(module, **options)

    fsdp.fully_shard = fill_and_shard
    try:
        yield
    finally:
        fsdp.fully_shard = shard


@contextlib.contextmanager
def _by_object(units: Sequence[nn.Module]) -> Iterator[None]:
    """Make Accelerate shard these modules one by one while it prepares a model, and no others.

    By itself it knows units by the name of a class or by size (`accelerate/utils/fsdp_utils.py`,
    1.15), so that it could not tell a layer from a module of the same class inside another one, or
    from one that shares a parameter. Beside these units it still gives the embedding, the last norm
    and the head of a transformers model units of their own. The receipt refuses a run where this
    had no effect. test_workarounds.py tells when it can go."""
    from accelerate.utils import fsdp_utils

    policy, norm = fsdp_utils.fsdp2_prepare_auto_wrap_policy, fsdp_utils._find_final_norm
    chosen = set(units)

    def find_norm(model: nn.Module) -> nn.Module | None:
        return norm(model) if hasattr(model, "base_model_prefix") else None

    fsdp_utils.fsdp2_prepare_auto_wrap_policy = lambda plugin, model: chosen.__contains__
    fsdp_utils._find_final_norm = find_norm
    try:
        yield
    finally:
        fsdp_utils.fsdp2_prepare_auto_wrap_policy = policy
        fsdp_utils._find_final_norm = norm


@contextlib.contextmanager
def _without_state_dict() -> Iterator[None]:
    """Let whole parameters go one by one as they are sharded, while Accelerate prepares a model.

    Accelerate (1.15, `accelerate/utils/fsdp_utils.py`) keeps the model's `state_dict` until all are
    sharded, though it reads it under `cpu_ram_efficient_loading` alone: a rank held the whole model
    and its shard. test_workarounds.py tells when this can go."""
    state_dict = nn.Module.state_dict
    nn.Module.state_dict = lambda *_, **__: {}  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.state_dict = state_dict  # type: ignore[method-assign]


@contextlib.contextmanager
def _no_deepspeed() -> Iterator[None]:
    """Tell Accelerate that there is no deepspeed, while it prepares a model for something else.

    Else its FSDP2 code imports deepspeed (0.3 s) to see that the model is not deepspeed's engine.
    """
    from accelerate.utils import other

    found = other.is_deepspeed_available
    other.is_deepspeed_available = lambda: False
    try:
        yield
    finally:
        other.is_deepspeed_available = found


def _keep_ddp(prepared: PreparedModel, handler: Any) -> PreparedModel:
    """Put the model under DDP where Accelerate did not.

    In one process on a GPU it leaves the model as it is, because `accelerate/accelerator.py` (1.15)
    asks for more than one process there, though on a CPU it does not. test_workarounds.py tells
    when this can go."""
    from torch.nn.parallel import DistributedDataParallel

    alone = torch.distributed.get_world_size() == 1
    if isinstance(prepared.model, DistributedDataParallel) or not alone:
        return prepared
    model = DistributedDataParallel(prepared.model, **handler.to_kwargs())
    handler.register_comm_hook(model)
    return prepared._replace(model=model)


def _keep_fsdp(accelerator: Any, plugin: Any, placement: Placement) -> None:
    """Make Accelerate keep the FSDP2 that it was asked for.

    On a host without a GPU its state silently becomes MULTI_CPU, which means DDP, because
    `accelerate/state.py` (1.15) allows FSDP on GPU-like devices only, though its FSDP2 code runs on
    CPUs without a change. The receipt refuses a run where this had no effect, since it looks for
    DTensors. test_workarounds.py tells when this can go."""
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
