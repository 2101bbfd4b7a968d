"""Plain torch training: one model in one process, or replicas that step alone and are merged.

`single` is one replica with all samples. `local_sgd` is one replica a rank; its emulation holds all
replicas in one process and merges them by the same rule, which is what a real run is compared with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..data.loader import MicroBatch
from ..job.errors import RunError
from ..job.schema import Job
from ..launch.exchange import gather_objects, gather_rows
from ..launch.placement import Placement
from ..models.layers import Layers
from ..models.losses import Loss
from ..records import EvalResult, Receipt
from .layers import sample_seeds
from .optimizer import (
    LossScale,
    build_optimizer,
    clip,
    global_norm,
    no_decay_names,
    read_learning_rate,
    set_learning_rate,
)
from .precision import DTYPES, Observer, Stepped, check_ledger, make_ledger, names_of, round_at_use
from .protocol import StepResult, make_receipt
from .schedule import learning_rate
from .state import copy_of_state, copy_state, gradient_dtypes, named_tensors, num_held, on_device
from .tally import StepRow, Tally, count_targets, eval_result, num_rows, step_result


class ReplicaEngine:
    """Replicas of a model, each stepping on its own share of the global batch.

    `merge_every` optimizer steps (None: never) their parameters and floating-point buffers are
    averaged, each replica weighted by the samples it saw since the last merge (federated averaging,
    McMahan et al. 2017, https://arxiv.org/abs/1602.05629), and once more after the last step.
    """

    micro_batch_size: int | None = None
    shares: tuple[int, ...]

    def __init__(
        self,
        job: Job,
        placement: Placement,
        layers: Layers,
        loss: Loss,
        merge_every: int | None = None,
        replicas: int = 1,
    ) -> None:
        self.job, self.loss, self.merge_every = job, loss, merge_every
        self.rank, self.layout, self.device = placement.rank, placement.layout, placement.device
        self.observer = Observer(layers)
        no_decay = no_decay_names(layers, job.optimizer.no_decay)
        first = layers.whole().to(self.device)
        self.models = [first, *(copy.deepcopy(first) for _ in range(replicas - 1))]
        self.num_held = replicas * num_held(first)
        self.optimizers = [
            build_optimizer(job, dict(m.named_parameters()), no_decay) for m in self.models
        ]
        self.scales = [LossScale(job, self.device) for _ in self.models]
        self.buffers = names_of(first.buffers())
        self.gradients = ""
        for model in self.models:
            round_at_use(model, DTYPES[job.train.precision])
        self.shares = tuple(range(replicas)) if replicas > 1 else (placement.dp_rank,)
        self.step = 0
        self.seen = [0] * self.layout.dp
        self.drift: list[dict[str, float]] = []
        self.digests: tuple[str, ...] = ()

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """See `Engine`. The gradient norm of several replicas is the root mean square of theirs."""
        each, scale = len(micro_batches) // len(self.models), self._scale()
        mine = [
            self._step_replica(i, micro_batches[i * each : (i + 1) * each])
            for i in range(len(self.models))
        ]
        rows = mine if len(mine) > 1 else gather_rows(mine[0])
        self.seen = [n + row.samples for n, row in zip(self.seen, rows, strict=True)]
        norm = math.sqrt(sum(row.grad_norm**2 for row in rows) / len(rows))
        rows = [row._replace(grad_norm=norm) for row in rows]
        result = step_result(rows, expected=None, scale=scale)
        self.observer.stop()
        self.digests = self.digests or result.digest_by_rank
        self.step += 1
        if self.merge_every and (
            self.step % self.merge_every == 0 or self.step == self.job.train.steps
        ):
            self._merge()
        return result

    def _step_replica(self, i: int, micro_batches: Sequence[MicroBatch]) -> StepRow:
        model, optimizer = self.models[i], self.optimizers[i]
        scale, share = self.scales[i], self.shares[i]
        tally = Tally(self.device)
        count = sum(count_targets(self.loss, mb) for mb in micro_batches)
        model.train()
        for k, micro_batch in enumerate(micro_batches):
            micro_batch = on_device(micro_batch, self.device)
            rows = num_rows(micro_batch.target)
            with sample_seeds(self.job, self.step, (share, k, 0), micro_batch.ids, rows):
                loss_sum = tally.add(self.loss, model(micro_batch.input), micro_batch)
            scale.scale(loss_sum / max(1, count)).backward()
        if int(tally.count) != count:
            raise RunError(f"the loss counted {int(tally.count)} targets, {count} were expected")
        scale.unscale(optimizer)
        norm = global_norm(model.parameters())
        clip(model.parameters(), norm, self.job.train.clip_norm)
        self.gradients = self.gradients or gradient_dtypes(model)
        set_learning_rate(optimizer, learning_rate(self.job, self.step))
        scale.step(optimizer)
        optimizer.zero_grad()
        return tally.step_row(norm, read_learning_rate(optimizer))

    def _scale(self) -> float | None:
        """fp16's loss scale of the first replica."""
        return self.scales[0].value if self.job.train.precision == "fp16" else None

    @torch.no_grad()
    def _merge(self) -> None:
        """Replace every replica by their weighted mean, and note how far they were from it. Bucket
        by bucket: all at once would take the memory of two more copies."""
        groups = [_merged_tensors(model) for model in self.models]
        square, apart = 0.0, [0.0] * len(groups)
        for bucket in _buckets(groups[0]):
            flats = [torch.cat([tensors[i].reshape(-1) for i in bucket]) for tensors in groups]
            mean = self._mean(flats)
            square += _square(mean)
            for k, (tensors, flat) in enumerate(zip(groups, flats, strict=True)):
                apart[k] += _square(flat - mean)
                pieces = mean.split([tensors[i].numel() for i in bucket])
                for i, piece in zip(bucket, pieces, strict=True):
                    tensors[i].copy_(piece.view_as(tensors[i]))
        self._note_drift([math.sqrt(a / square) for a in apart])
        self.seen = [0] * self.layout.dp

    def _mean(self, flats: Sequence[torch.Tensor]) -> torch.Tensor:
        """The mean over all replicas, each weighted by its samples; `flats` are this process's."""
        # Weights around 1, divided at the end: equal shares then lose nothing to a rounded 1/3.
        weights = [self.seen[share] * self.layout.dp / sum(self.seen) for share in self.shares]
        mean = torch.stack([f * w for f, w in zip(flats, weights, strict=True)]).sum(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
        return mean / self.layout.dp

    def _note_drift(self, away: Sequence[float]) -> None:
        """`away`: distance of this process's replicas from the mean, relative to its length."""
        rows = [[a] for a in away] if len(away) > 1 else gather_rows(away)
        all_away = [float(row[0]) for row in rows]
        self.drift.append(
            {
                "step": self.step - 1,
                "max_relative_drift": max(all_away),
                "mean_relative_drift": sum(all_away) / len(all_away),
            }
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        """See `Engine`."""
        self._require_merged()
        tally = Tally(self.device)
        model = self.models[0].eval()
        for micro_batches in batches:
            for micro_batch in micro_batches:
                micro_batch = on_device(micro_batch, self.device)
                tally.add(self.loss, model(micro_batch.input), micro_batch, score=True)
        return eval_result(tally.row())

    def state(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        self._require_merged()
        if self.rank:
            return {}
        return copy_of_state(self.models[0])

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`."""
        for model in self.models:
            copy_state(named_tensors(model), state)

    def _require_merged(self) -> None:
        if self.merge_every and any(self.seen) and self.layout.dp > 1:
            raise RunError(f"replicas stepped alone since the last merge (step {self.step})")

    def receipt(self) -> Receipt:
        """See `Engine`."""
        alone = self.merge_every is None
        groups = gather_objects(dist.is_initialized() and dist.get_world_size())
        evidence: dict[str, Any] = {
            "model": type(self.models[0]).__name__,
            "replicas": len(self.models) * len(groups),
            "parameters_per_replica": sum(p.numel() for p in self.models[0].parameters()),
            "gradient_collectives": "none",
        }
        stepped = Stepped.plain(self.optimizers[0], self.gradients)
        ledger = make_ledger(self.observer, self.models[0], stepped)
        evidence["precision"] = ledger
        conditions = {
            f"{self.layout.dp} replicas": evidence["replicas"] == self.layout.dp,
            **check_ledger(self.job.train.precision, self.buffers, ledger),
        }
        if not alone:
            evidence |= {"merge_every": self.merge_every, "merges": len(self.drift)}
            evidence |= {"sample_digest_by_rank": list(self.digests), "drift": self.drift}
            ran_alone = any(d["max_relative_drift"] > 0 for d in self.drift) or not self.drift
            conditions["replicas differ before merges"] = ran_alone or self.layout.dp == 1
        return make_receipt(evidence, conditions)

    def close(self) -> None:
        """See `Engine`."""
        self.models, self.optimizers = [], []


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Indices of tensors that are merged together: about a sixteenth of all elements, but not less
    than a MiB, in one collective."""
    size = max(sum(t.numel() for t in tensors) // 16, 2**18)
    buckets: list[list[int]] = []
    room = 0
    for i, tensor in enumerate(tensors):
        if tensor.numel() > room or not buckets:
            buckets.append([])
            room = size
        buckets[-1].append(i)
        room -= tensor.numel()
    return buckets


def _square(values: torch.Tensor) -> float:
    """The squared length, summed in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _merged_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [t.data for t in named_tensors(model).values() if t.is_floating_point()]
