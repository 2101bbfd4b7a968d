"""The engine behind ZeRO-1, 2 and 3: a model and DeepSpeed's optimizer, prepared by Accelerate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..job.schema import Job
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from ..models.losses import Loss
from ..records import Receipt
from .accelerated import AcceleratedEngine, State
from .accelerator import PreparedModel
from .deepspeed_setup import fp32_partitions, full_tensor, set_masters, stepped
from .precision import Stepped
from .protocol import make_receipt
from .state import copy_state, named_tensors


class ZeroEngine(AcceleratedEngine):
    """A model under one ZeRO stage. DeepSpeed scales the loss, clips and steps inside backward."""

    def __init__(
        self,
        job: Job,
        placement: Placement,
        loss: Loss,
        accelerator: Any,
        prepared: PreparedModel,
        zero_stage: int,
    ) -> None:
        super().__init__(job, placement, loss, accelerator, prepared, _inspect, _gather, _scatter)
        self.zero_stage = zero_stage

    @property
    def live(self) -> Any:
        """DeepSpeed's engine."""
        return self.accelerator.deepspeed_engine_wrapped.engine

    def _loss_scale(self) -> float | None:
        fp16 = self.job.train.precision == "fp16"
        return float(self.live.optimizer.loss_scale) if fp16 else None

    def _backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def _update(self) -> float:
        norm = self.accelerator.clip_grad_norm_(None, math.inf)
        return math.inf if self.live.optimizer.overflow else float(norm)

    def _stepped(self) -> Stepped:
        return stepped(self.live.optimizer)


def _inspect(engine: ZeroEngine) -> Receipt:
    """The stage that DeepSpeed runs, and what each rank holds of parameters and optimizer state."""
    live, wanted = engine.live, engine.zero_stage
    stage = int(live.zero_optimization_stage())
    parameters = list(live.module.parameters())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
    local = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in parameters)
    optimizer = live.optimizer
    master = sum(t.numel() for t in fp32_partitions(optimizer))
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


def _gather(engine: ZeroEngine) -> State:
    """Full tensors on rank 0, gathered one by one; nothing elsewhere."""
    full = {}
    for name, tensor in named_tensors(engine.live.module).items():
        whole = full_tensor(tensor)  # collective
        if engine.accelerator.is_main_process:
            full[name] = whole
    return full


def _scatter(engine: ZeroEngine, state: Mapping[str, torch.Tensor]) -> None:
    """Take over full parameters, and the optimizer's own fp32 copies with them."""
    import deepspeed

    tensors = named_tensors(engine.live.module)
    partitioned = [t for t in tensors.values() if hasattr(t, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
        copy_state(tensors, state)
    set_masters(tensors, state)
