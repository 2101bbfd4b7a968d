"""The one file that imports Accelerate: DDP, FSDP2 and ZeRO behind one engine.

Accelerate prepares model and optimizer and runs its own accumulation loop; this file feeds it, and
works round what it does silently on hosts without a GPU (`_keep_fsdp`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from ..config import Job
from ..data.batches import MicroBatch
from ..layout import Layout, Ranks
from ..models.losses import Loss
from ..processes import COLLECTIVE_TIMEOUT, device, gather_rows
from ..records import EvalResult, Receipt
from ..schedule import learning_rate
from . import _torch
from .base import StepResult

State = dict[str, torch.Tensor]


class AccelerateEngine:
    """A model and an optimizer prepared by one `Accelerator`.

    `inspect(engine)` gives the strategy's receipt, `gather(engine)` its full tensors on every rank,
    and `scatter(engine, state)` takes them back: the three things that differ between strategies.
    """

    micro_batch_size: int | None = None
    shares: tuple[int, ...]

    def __init__(
        self,
        job: Job,
        layout: Layout,
        loss: Loss,
        accelerator: Any,
        prepared: tuple[nn.Module, Any],
        inspect: Callable[[AccelerateEngine], Receipt],
        gather: Callable[[AccelerateEngine], State],
        scatter: Callable[[AccelerateEngine, Mapping[str, torch.Tensor]], None],
    ) -> None:
        self.job, self.layout, self.loss = job, layout, loss
        self.accelerator = accelerator
        self.model, self.optimizer = prepared
        self.inspect, self.gather, self.scatter = inspect, gather, scatter
        self.device = device()
        self.shares = (layout.dp_rank(Ranks.from_env().rank),)
        self.step = 0
        self.digests: tuple[str, ...] = ()

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """See `Engine`."""
        tally = _torch.Tally(self.device)
        mine = sum(_torch.count_targets(self.loss, mb) for mb in micro_batches)
        count = sum(int(row[0]) for row in gather_rows([mine]))
        # Accelerate (or DeepSpeed) divides by the micro-batches, and the reduction averages over
        # ranks; a mean over the global batch's targets wants neither.
        scale = len(micro_batches) * self.layout.dp / max(1, count)
        limit = self.job.train.clip_norm or math.inf
        self.model.train()
        _torch.set_learning_rate(self.optimizer, learning_rate(self.job, self.step))
        norm: Any = math.nan
        for micro_batch in micro_batches:
            micro_batch = self._on_device(micro_batch)
            with self.accelerator.accumulate(self.model):
                output = self.model(micro_batch.input)
                loss_sum = tally.add(self.loss, output, micro_batch)
                self.accelerator.backward(loss_sum * scale)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.step += 1
        rate = _torch.read_learning_rate(self.optimizer)
        rows = gather_rows([*tally.row(), _number(norm), rate])
        result = _torch.step_result(rows, count)
        self.digests = self.digests or result.digest_by_rank
        return result

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        """See `Engine`."""
        tally = _torch.Tally(self.device)
        self.model.eval()
        for micro_batches in batches:
            for micro_batch in micro_batches:
                micro_batch = self._on_device(micro_batch)
                tally.add(self.loss, self.model(micro_batch.input), micro_batch, score=True)
        return _torch.eval_result(tally.row())

    def state(self) -> State:
        """See `Engine`."""
        full = self.gather(self)
        return full if self.accelerator.is_main_process else {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`."""
        self.scatter(self, state)

    def receipt(self) -> Receipt:
        """See `Engine`."""
        return self.inspect(self)

    def close(self) -> None:
        """See `Engine`."""
        self.accelerator.free_memory()
        self.model = self.optimizer = None  # type: ignore[assignment]

    def _on_device(self, micro_batch: MicroBatch) -> MicroBatch:
        inputs = _torch.to_device(micro_batch.input, self.device)
        target = _torch.to_device(micro_batch.target, self.device)
        return MicroBatch(inputs, target, micro_batch.ids)


def prepare_ddp(
    job: Job, layers: list[nn.Module], accumulation: int, hook: str, state_options: dict[str, Any]
) -> tuple[Any, tuple[Any, Any]]:
    """The model under DistributedDataParallel, with a communication hook ("no", "bf16", "fp16",
    "power_sgd") and `strategy.ddp.bucket_cap_mb`."""
    bf16_on_cpu = hook == "bf16" and device().type == "cpu"
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    handler = DistributedDataParallelKwargs(
        bucket_cap_mb=job.strategy.ddp.bucket_cap_mb,
        comm_hook=DDPCommunicationHookType("no" if bf16_on_cpu else hook),
        comm_state_option=state_options,
    )
    accelerator = _accelerator(accumulation, kwargs_handlers=[handler])
    prepared: tuple[Any, Any] = _prepare(job, accelerator, layers)
    if bf16_on_cpu:
        prepared[0].register_comm_hook(None, _bf16_hook())
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
    job: Job, layout: Layout, layers: list[nn.Module], accumulation: int
) -> tuple[Any, tuple[nn.Module, Any]]:
    """The model under FSDP2, every layer of the flat list that has parameters a unit of its own."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=job.strategy.fsdp.reshard_after_forward,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted(
            {type(layer).__name__ for layer in layers if any(True for _ in layer.parameters())}
        ),
        cpu_ram_efficient_loading=False,
    )
    accelerator = _accelerator(accumulation, fsdp_plugin=plugin)
    _keep_fsdp(accelerator, plugin, layout)
    return accelerator, _prepare(job, accelerator, layers)


def prepare_zero(
    job: Job, layers: list[nn.Module], accumulation: int, ds_config: dict[str, Any]
) -> tuple[Any, tuple[nn.Module, Any]]:
    """The model under DeepSpeed's ZeRO, from a complete DeepSpeed configuration."""
    # Accelerate reads the variable, not its argument, to decide whether DeepSpeed runs at all, and
    # then only when it is not told that the host is a CPU (accelerate/state.py).
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate.utils import DeepSpeedPlugin

    accelerator = _accelerator(
        accumulation, cpu=False, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds_config)
    )
    return accelerator, _prepare(job, accelerator, layers)


def _accelerator(accumulation: int, cpu: bool | None = None, **options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    here = device()
    group = InitProcessGroupKwargs(
        backend="nccl" if here.type == "cuda" else "gloo",
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT.total_seconds()),
    )
    handlers = [group, *options.pop("kwargs_handlers", [])]
    return Accelerator(
        cpu=here.type == "cpu" if cpu is None else cpu,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=handlers,
        mixed_precision="no",
        **options,
    )


def _prepare(job: Job, accelerator: Any, layers: list[nn.Module]) -> tuple[nn.Module, Any]:
    model = nn.Sequential(*layers)
    return accelerator.prepare(model, _torch.build_optimizer(job, model.parameters()))


def _keep_fsdp(accelerator: Any, plugin: Any, layout: Layout) -> None:
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
    if layout.replicate > 1:
        from accelerate.parallelism_config import ParallelismConfig

        degrees = ParallelismConfig(dp_replicate_size=layout.replicate, dp_shard_size=layout.shard)
        state.parallelism_config = degrees
        state.device_mesh = degrees.build_device_mesh(device().type)


def _number(norm: Any) -> float:
    if isinstance(norm, torch.Tensor):
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(full)
    return float(norm)
