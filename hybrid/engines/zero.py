"""This module holds the engine behind ZeRO-1, 2 and 3: Accelerate runs DeepSpeed's optimizer."""

import contextlib
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.pieces import Piece
from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.exchange import gather_objects
from ..launch.placement import Placement
from ..models.layers import Layers
from ..models.losses import Loss
from ..records import Receipt
from .accelerated import AcceleratedEngine
from .accelerator import prepare_zero
from .deepspeed_scale import read_counts, read_loss_scale, scaler_of, set_progress
from .deepspeed_setup import (
    add_biases_before_rounding,
    fp32_partitions,
    full_config,
    hold_steps,
    loss_scale,
    norm_or_overflow,
    norm_switch,
    prepare_process,
    set_masters,
    stepped,
)
from .deepspeed_state import (
    fragments_of,
    make_room_in_partitions,
    numbers_in_partitions,
    pieces_of_partitions,
    update_parameters,
    weights_of_partitions,
)
from .frozen import FrozenParts
from .guard import is_held
from .precision import Stepped
from .protocol import OwnState, Shapes, make_receipt
from .state import copy_state, local_part, named_tensors
from .tally import Tally
from .training_state import as_stepper
from .zero_copies import keep_one_copy, step_on_gradients
from .zero_partition import partition


class ZeroEngine(AcceleratedEngine):
    """Trains a model under one ZeRO stage.
    DeepSpeed scales the loss, clips and steps by itself."""

    def __init__(
        self, job: Job, placement: Placement, layers: Layers, loss: Loss, name: str, zero_stage: int
    ) -> None:
        config = full_config(job, placement, layers, name, zero_stage)
        prepare_process(placement)
        cut, rounds = None, job.train.precision != "fp32"
        parts = FrozenParts(
            layers.names() if rounds else (), placement.dp_rank, placement.layout.dp
        )
        if zero_stage == 3:
            from deepspeed.runtime.zero.partition_parameters import Init
            from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

            add_biases_before_rounding()
            keep_one_copy(DeepSpeedZeroOptimizer_Stage3)
            cut = functools.partial(
                partition,
                layers=layers,
                frozen=parts if rounds else None,
                init=Init,
                config=config,
                device=placement.device,
            )
        prepared = prepare_zero(job, placement, layers, job.micro_batches(name), config, cut)
        super().__init__(job, placement, loss, prepared, _inspect, _scatter)
        self.zero_stage, self.frozen = zero_stage, parts
        if zero_stage == 3:
            step_on_gradients(self.live.optimizer)
        self.take_norm = norm_switch(self.live.optimizer)
        if self.guard:
            hold_steps(self.live.optimizer, lambda norm: is_held(self, norm))
        # DeepSpeed would sum the gradients of rounded parameters in their own precision.
        exact, accumulates = job.train.precision == "fp32", job.micro_batches(name) > 1
        wanted = zero_stage == 2 and job.strategy.zero2.reduce_once
        self.reduces_once = wanted and exact and accumulates
        if self.reduces_once:
            self.live.set_gradient_accumulation_boundary(True)

    @property
    def live(self) -> Any:
        """Return DeepSpeed's engine."""
        return self.accelerator.deepspeed_engine_wrapped.engine

    def _loss_scale(self) -> float:
        return loss_scale(self.live.optimizer)

    def _accumulate(self, micro_batches: Sequence[MicroBatch], tally: Tally) -> None:
        self.take_norm(self.norm_is_due)
        once = self.live.coalesce_grad_reduction() if self.reduces_once else None
        with once or contextlib.nullcontext():
            super()._accumulate(micro_batches, tally)

    def _backward(self, loss_sum: torch.Tensor, micro_batches: int) -> None:
        # DeepSpeed divides by the micro-batches, and its reduction averages over ranks: undo both.
        share = micro_batches * self.layout.dp / (self._count_all() or 1)
        self.live.backward(loss_sum * share)
        if not self.reduces_once:
            self.live.step()  # after the last micro-batch alone it does more than count

    def _reduction(self, due: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _update(self) -> torch.Tensor | float:
        if self.reduces_once:
            self.live.step()
        if not self.norm_is_due:
            return math.nan
        return norm_or_overflow(self.live.optimizer, self.live.get_global_grad_norm())

    def _stepped(self) -> Stepped:
        return stepped(self.live.optimizer)

    def pieces(self) -> list[Piece]:
        return pieces_of_partitions(
            self._tensors(), self.live.optimizer, self._copies(), self.frozen
        )

    def weights(self) -> list[Piece]:
        fragments = fragments_of(self.live.optimizer)
        return weights_of_partitions(self._tensors(), fragments, self._copies(), self.frozen)

    def make_room(self, shapes: Shapes, numbers: Collection[str]) -> None:
        make_room_in_partitions(self._tensors(), self.live.optimizer, shapes, numbers)

    def stepper(self) -> torch.optim.Optimizer | None:
        # DeepSpeed keeps its parts' moments in the optimizer that it wraps, and calls that to step.
        wrapped = getattr(self.live.optimizer, "optimizer", None)
        return as_stepper(self.job, wrapped) if wrapped is not None else None

    def numbers_kept(self) -> list[str]:
        return numbers_in_partitions(self.live.optimizer)

    def loss_scale_state(self) -> dict[str, float] | None:
        return read_loss_scale(scaler_of(self.live))

    def own_state(self) -> OwnState:
        return OwnState({}, read_counts(scaler_of(self.live)))

    def begin_at(
        self, step: int, loss_scale: Mapping[str, float] | None, own: OwnState | None
    ) -> None:
        super().begin_at(step, loss_scale, own)
        set_progress(self.live, step, loss_scale, own.numbers if own else {})
        self.frozen.round()
        update_parameters(self.live.optimizer)

    def close(self) -> None:
        self.live.destroy()
        super().close()


def _inspect(engine: ZeroEngine) -> Receipt:
    """Show DeepSpeed's stage, and each rank's elements of parameters and fp32 master weights."""
    live, wanted = engine.live, engine.zero_stage
    stage, optimizer = int(live.zero_optimization_stage()), live.optimizer
    parameters = list(live.module.parameters())
    sizes = {p: getattr(p, "ds_numel", p.numel()) for p in parameters}
    total = sum(sizes.values())
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    held = gather_objects(sum(local_part(p).numel() for p in parameters))
    masters = gather_objects(sum(t.numel() for t in fp32_partitions(optimizer)))
    partitioned = stage == 3 or bool(getattr(optimizer, "partition_gradients", 0))
    evidence = {
        "model": type(live).__name__,
        "distributed_type": str(engine.accelerator.distributed_type),
        "zero_stage": stage,
        "optimizer": type(optimizer).__name__,
        "gradients_partitioned": partitioned,
        "gradients_reduced": "each step"
        if stage == 1 or engine.reduces_once
        else "each micro-batch",
        "elements_total": total,
        "parameter_elements_by_rank": held,
        "master_elements_by_rank": masters,
        "sample_digest_by_rank": list(engine.digests),
    }
    n, padding = engine.layout.dp, 2 * engine.layout.dp * (len(parameters) + 1)
    conditions = {
        f"DeepSpeed runs ZeRO stage {wanted}": stage == wanted,
        "fp32 parameters partitioned once over the ranks": all(
            trained <= m * n <= trained + padding * n for m in masters
        ),
        "gradients partitioned from stage 2 on": partitioned == (wanted > 1),
        "parameters partitioned at stage 3 only": all(
            (h * n <= total + padding * n) if wanted == 3 else h == total for h in held
        ),
    }
    return make_receipt(evidence, conditions)


def _scatter(engine: ZeroEngine, state: Mapping[str, torch.Tensor]) -> None:
    """Take over full parameters, and put them into the optimizer's fp32 master weights too."""
    import deepspeed

    tensors = named_tensors(engine.live.module)
    partitioned = [t for t in tensors.values() if hasattr(t, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0, enabled=bool(partitioned)):
        copy_state(tensors, state)
    engine.frozen.take(tensors, state)
    set_masters(tensors, state)
