"""An engine over plain `deepspeed.initialize`, as a strategy of one's own might have it.

Nothing here stands between DeepSpeed and its configuration, which is given as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybrid.checkpoint.pieces import Piece
from hybrid.data.loader import MicroBatch
from hybrid.engines.accelerated import AcceleratedEngine
from hybrid.engines.accelerator import PreparedModel
from hybrid.engines.deepspeed_setup import prepare_process
from hybrid.engines.optimizer import build_optimizer
from hybrid.engines.precision import Observer, Stepped, make_ledger, names_of
from hybrid.engines.protocol import make_receipt
from hybrid.engines.state import copy_state, named_tensors
from hybrid.engines.tally import Tally
from hybrid.engines.training_state import weights_of
from hybrid.job.schema import Job
from hybrid.launch.placement import Placement
from hybrid.layout import micro_batch_size
from hybrid.models.layers import Layers
from hybrid.models.losses import Loss
from hybrid.records import Receipt


class PlainEngine(AcceleratedEngine):
    """Trains a whole model on each rank, by DeepSpeed's engine with ZeRO-0 or ZeRO-1."""

    def __init__(
        self, job: Job, placement: Placement, layers: Layers, loss: Loss, config: dict[str, Any]
    ) -> None:
        prepare_process(placement)
        prepared = _prepare(job, placement, layers, config)
        super().__init__(job, placement, loss, prepared, _inspect, _scatter)

    def _accumulate(self, micro_batches: list[MicroBatch], tally: Tally) -> None:  # type: ignore[override]
        # DeepSpeed divides by the micro-batches, and its reduction averages over ranks: undo both.
        share = len(micro_batches) * self.layout.dp / max(1, self._count_all())
        for k, micro_batch in enumerate(micro_batches):
            loss_sum = self._forward(self.model, micro_batch, (*self.shares, k, 0), tally)
            self.model.backward(loss_sum * share)
            self.model.step()

    def _update(self) -> torch.Tensor | float:
        return float(self.model.get_global_grad_norm())

    def _norm_is_whole(self) -> bool:
        return True

    def weights(self) -> list[Piece]:
        return weights_of(_whole(self), self._copies())

    def _add_ledger(self, receipt: Receipt, stepped: Stepped) -> Receipt:
        """Show what DeepSpeed holds, without conditions: its own defaults are what is tried."""
        ledger = make_ledger(self.observer, self.model, stepped)
        return Receipt(receipt.engaged, receipt.evidence | {"precision": ledger}, receipt.reason)

    def _stepped(self) -> Stepped:
        inner = self.model.optimizer.optimizer
        return Stepped.plain(inner, names_of(self.model.parameters()))

    def close(self) -> None:
        self.model.destroy()
        super().close()


def _prepare(
    job: Job, placement: Placement, layers: Layers, config: dict[str, Any]
) -> PreparedModel:
    """Put the model under DeepSpeed, with the file's configuration and the job's batch size."""
    import deepspeed

    observer = Observer(layers, job.train.compile)
    model = layers.whole()
    buffers = names_of(model.buffers())
    optimizer = build_optimizer(job, dict(model.named_parameters()), set())
    dp, pieces = placement.layout.dp, job.train.micro_batches
    batch = {
        "train_micro_batch_size_per_gpu": micro_batch_size(job.train.global_batch, dp, pieces),
        "gradient_accumulation_steps": pieces,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, live, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config | batch, dist_init_required=False
    )
    return PreparedModel(None, engine, live, observer, buffers)


def _inspect(engine: PlainEngine) -> Receipt:
    """Show DeepSpeed's engine, its ZeRO stage, and each rank's samples."""
    live = engine.model
    evidence = {
        "model": type(live).__name__,
        "zero_stage": int(live.zero_optimization_stage()),
        "optimizer": type(live.optimizer).__name__,
        "gradient_clipping": float(live.gradient_clipping()),
        "sample_digest_by_rank": list(engine.digests),
    }
    stages = live.dp_world_size == engine.layout.dp
    return make_receipt(evidence, {f"{engine.layout.dp} data-parallel ranks": stages})


def _whole(engine: PlainEngine) -> dict[str, torch.Tensor]:
    """Return the fp32 master weights, where there are any, in the place of rounded ones."""
    from deepspeed.utils import safe_get_full_fp32_param

    optimizer, masters = engine.model.optimizer, dict[torch.Tensor, torch.Tensor]()
    if hasattr(optimizer, "fp16_groups"):  # without ZeRO, which DeepSpeed's function does not know
        for rounded, whole in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= dict(zip(rounded, whole, strict=True))
    found = {}
    for name, tensor in named_tensors(engine.model.module).items():
        master = masters.get(tensor)
        if master is None and tensor.requires_grad:
            master = safe_get_full_fp32_param(tensor)
        found[name] = (tensor if master is None else master).detach().float()
    return found


def _scatter(engine: PlainEngine, state: Mapping[str, torch.Tensor]) -> None:
    copy_state(named_tensors(engine.model.module), state)
