"""This module starts DeepSpeed, completes its configuration, and handles fp32 master weights."""

import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..job.errors import RunError
from ..job.schema import Job
from ..launch.ops_cache import remove_stale_locks, set_ops_folder
from ..launch.placement import OWN, Placement
from ..layout import micro_batch_size
from ..models.layers import Layers
from .deepspeed_config import SHIPPED, load_ds_config
from .frozen import FrozenParts
from .precision import Stepped, deepspeed_keys, name_of

BUCKETS = ("reduce_bucket_size", "allgather_bucket_size")


def prepare_process(placement: Placement) -> None:
    """Have DeepSpeed use the process group that this process has joined.

    On CPUs DeepSpeed would first compile a shared-memory all-reduce (20 to 80 s, and a killed build
    leaves a lock that stops every later start). gloo does that work here, where it can be counted.
    DeepSpeed would also run the compiler for each op to find out which of them this machine can
    compile (0.2 s a rank), so this replaces what builds the op. test_workarounds.py tells when it
    can go."""
    import_deepspeed()
    if placement.launcher != OWN and placement.local_rank == 0:
        remove_stale_locks()  # else the process that started the ranks has done so
    import deepspeed

    # By this name, since the attribute `deepspeed.comm.torch` is torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(placement.backend, verbose=False)


def import_deepspeed() -> None:
    """Import DeepSpeed and all that ZeRO imports later, without torch's compiler (1 s).

    Every ZeRO run imports DeepSpeed's Muon optimizer, two functions of which are decorated with
    `torch.compile`. No strategy uses them."""
    set_ops_folder()
    found = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if found is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = found


def full_config(
    job: Job, placement: Placement, layers: Layers, name: str, zero_stage: int
) -> dict[str, Any]:
    """Return the whole DeepSpeed configuration of strategy `name`: the file's keys and the job's.

    Buckets take memory on top of the model (DeepSpeed's default of 5e8 elements is 2 GB), so those
    of the shipped files are cut to a small part of it, and communication overlaps where there are
    streams, on GPUs. What a user's own file says stays. Leaving `gradient_clipping` out would not
    switch it off, since Accelerate fills in 1.0."""
    shipped = name if zero_stage else "pipeline"  # the same for 2d without ZeRO
    named = getattr(job.settings(name), "ds_config", None)
    config = load_ds_config(named or shipped, zero_stage)
    micro_batches, dp = job.micro_batches(name), placement.layout.dp
    size = micro_batch_size(job.train.global_batch, dp, micro_batches)
    elements = sum(p.numel() for p in layers.names())
    zero = config.setdefault("zero_optimization", {})
    own = {} if named in (None, *SHIPPED) else {k: v for k, v in zero.items() if k != "stage"}
    if pipeline_stage(job, zero_stage) != zero_stage:
        zero |= {"stage": 1, **dict.fromkeys(BUCKETS, elements)}
    limits = _limits(layers, ahead=placement.device.type == "cuda")
    zero |= {key: min(zero[key], limits[key]) for key in zero.keys() & limits.keys()}
    # DeepSpeed switches it off under a pipeline, with a warning.
    zero["overlap_comm"] = placement.device.type == "cuda" and placement.layout.pp == 1
    zero |= own
    return {
        **config,
        **deepspeed_keys(job.train.precision),
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": size * micro_batches * dp,
        "gradient_clipping": job.train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def _limits(layers: Layers, ahead: bool) -> dict[str, int]:
    """Return how many elements DeepSpeed may hold beside its shards, by key.

    A bucket is a sixteenth of the model, at least 2**18 elements (a MiB in fp32). Gathered
    parameters are those of two layers, as under FSDP, where the next one is gathered `ahead` of its
    use; on CPUs, where that takes the cores that compute, what has been gathered is one layer."""
    elements, largest = sum(p.numel() for p in layers.names()), max(layers.sizes())
    bucket = max(elements // 16, 2**18)
    return {
        **dict.fromkeys(BUCKETS, bucket + bucket % 2),  # DeepSpeed needs an even number
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": (1 + ahead) * largest,
    }


def pipeline_stage(job: Job, zero_stage: int) -> int:
    """Return the ZeRO stage that a run asks DeepSpeed for.

    Only ZeRO-1 sums the gradients of rounded parameters in fp32. Over a single column it shards
    nothing, so a pipeline in bf16 or fp16 runs under it."""
    return zero_stage if job.train.precision == "fp32" else max(1, zero_stage)


def add_biases_before_rounding() -> None:
    """Make ZeRO-3's own linear function compute what torch's does.

    DeepSpeed's function (its graph keeps no gathered weights, unlike torch's) adds biases to
    products that are already rounded. In bf16 small biases are lost there: losses differ by 1e-3
    from the second step on."""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    def forward(input: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        return torch._C._nn.linear(input, weight, bias)

    LinearFunctionForZeroStage3.forward = staticmethod(forward)


def stepped(optimizer: Any) -> Stepped:
    """Describe what one of DeepSpeed's optimizers updates."""
    summed = getattr(optimizer, "grad_acc_dtype", None) or optimizer.gradient_accumulation_dtype
    return Stepped(optimizer.optimizer, fp32_partitions(optimizer), name_of(summed))


def loss_scale(optimizer: Any) -> float:
    """Return the scale that one of DeepSpeed's optimizers gives the loss; only fp16's have one."""
    return float(getattr(optimizer, "loss_scale", 1.0))


def norm_or_overflow(optimizer: Any, norm: torch.Tensor | float | None) -> torch.Tensor | float:
    """Return DeepSpeed's gradient norm, infinite where an fp16 gradient overflowed.

    Only fp16's optimizers look for overflows; the host reads nothing from a device elsewhere.
    Raises RunError where a DeepSpeed file has switched the norm off."""
    if optimizer.overflow:
        return math.inf
    if norm is None:
        raise RunError("DeepSpeed has taken no gradient norm: its configuration switches it off")
    return norm


def norm_switch(optimizer: Any) -> Callable[[bool], None]:
    """Return a function that tells a ZeRO optimizer whether to take the norm in its next step.

    DeepSpeed takes it in each step, which has an all-reduce and a read of the host, unless it is
    switched off for a whole run, and then under ZeRO-1 and 2 alone. In fp32 a step without it is
    made even if a gradient is not finite, as under other strategies; the next loss tells. Where the
    optimizer's state is offloaded, nothing is switched: the norm is taken while gradients move."""
    moved = ("cpu_offload", "offload_optimizer", "zenflow")
    if not any(getattr(optimizer, name, False) for name in moved):
        if (asked := getattr(optimizer, "compute_grad_norm", None)) is not None:
            return lambda taken: setattr(optimizer, "compute_grad_norm", asked and taken)
        if (take := getattr(optimizer, "_get_norm_groups", None)) is not None:  # ZeRO-3
            none = [0.0]  # as the norm of no gradients
            return lambda taken: setattr(
                optimizer, "_get_norm_groups", take if taken else none.copy
            )
    return lambda taken: None


def hold_steps(optimizer: Any, holds: Callable[[torch.Tensor | float], bool]) -> None:
    """Make one of DeepSpeed's optimizers ask `holds(norm)` once a step, before its update.

    Where that is true, the optimizer within it makes no step. DeepSpeed then copies fp32 master
    weights that have not changed. The loss scale is put back, and so is the note that parameters
    know their optimizer's state, which has not been made yet in a first step."""
    whole, inner = optimizer.step, optimizer.optimizer.step
    answers = list[bool]()

    def ask() -> bool:
        if not answers:
            answers.append(holds(norm_or_overflow(optimizer, optimizer._global_grad_norm)))
        return answers[0]

    def step_part(*arguments: Any, **options: Any) -> Any:  # ZeRO steps its groups one by one
        return None if ask() else inner(*arguments, **options)

    def step(*arguments: Any, **options: Any) -> None:
        answers.clear()
        scaler, linked = getattr(optimizer, "loss_scaler", None), "_hp_optimizer_states_linked"
        before, knew = dict(vars(scaler)) if scaler else {}, getattr(optimizer, linked, None)
        whole(*arguments, **options)
        if ask():  # DeepSpeed has asked nothing where it found an overflow itself
            vars(scaler).update(before) if scaler else None
            if knew is not None:
                setattr(optimizer, linked, knew)

    optimizer.step, optimizer.optimizer.step = step, step_part


def fp32_partitions(optimizer: Any) -> list[torch.Tensor]:
    """Return this rank's fp32 partitions, which each of DeepSpeed's optimizers names otherwise."""
    names = (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 in bf16
    )
    return list(next(getattr(optimizer, name) for name in names if hasattr(optimizer, name)))


def link_reordered(optimizer: Any) -> None:
    """Link parameters to their fp32 values where `round_robin_gradients` has reordered them.

    DeepSpeed takes them to lie in the model's order, unless it has padded them (0.19.8,
    `_link_all_hp_params`): whole values read or set by its functions would be others' values."""
    if getattr(optimizer, "round_robin_gradients", False):
        found = optimizer.round_robin_bit16_padding
        optimizer.round_robin_bit16_padding = [[True]] * len(found)
        optimizer._link_all_hp_params()
        optimizer.round_robin_bit16_padding = found


def restore_fp32_masters(model: nn.Module, precision: str, placement: Placement) -> "KeptValues":
    """Keep a model's fp32 values, and return what puts them into the master weights.

    Call this before DeepSpeed takes the model, and what it returns afterwards, with the group of
    the data-parallel ranks (None: all): DeepSpeed rounds the parameters first and makes its fp32
    master weights from the rounded ones. Each of these ranks keeps its part alone; whole parameters
    come back one by one."""
    rounds = precision != "fp32"
    rounded = model.parameters() if rounds else ()
    start = FrozenParts(rounded, placement.dp_rank, placement.layout.dp, trained=True)
    return KeptValues(start, rounds)


class KeptValues(NamedTuple):
    """Puts fp32 values that were kept into the master weights, once DeepSpeed has the model."""

    start: FrozenParts
    rounds: bool

    def keep(self, parameter: torch.Tensor) -> None:
        """Keep the value of a parameter that had none before."""
        if self.rounds:
            self.start.keep(parameter)

    def __call__(self, group: Any) -> None:
        """Put the values back; collective."""
        self.start.group = group
        for parameter in list(self.start.parts):
            _set_master(parameter, self.start.whole(parameter))
            del self.start.parts[parameter]


def set_masters(tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Put full values into the fp32 master weights of those tensors that are trained."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            _set_master(tensor, state[name])


def _set_master(parameter: Any, value: torch.Tensor) -> None:
    """Put a whole value into a parameter's fp32 master weight, of which this rank has a part.

    DeepSpeed's own function for whole values fails under ZeRO-3 where the size does not divide: it
    leaves out the padding of the last rank's part (0.19.8)."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = value.to(parameter.device, torch.float32)
    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)
        return
    size = parameter.ds_tensor.numel()
    start = size * dist.get_rank(parameter.ds_process_group)
    part = value.flatten()[start : start + size]
    padding = size - part.numel()
    safe_set_local_fp32_param(parameter, torch.nn.functional.pad(part, (0, padding)))
