"""This module trains in plain torch: one model, or replicas that step alone and are merged.

`single` is one replica with all samples. `local_sgd` is one replica a rank. Its emulation holds all
replicas in one process and merges them by the same rule; a real run is compared with it."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..checkpoint.pieces import Piece
from ..data.loader import MicroBatch
from ..job.errors import RunError
from ..job.schema import Job
from ..launch.exchange import gather_objects, gather_rows
from ..launch.placement import Placement
from ..models.layers import Layers
from ..models.losses import Loss
from ..records import EvalResult, Receipt
from .buffers import SharesInTurn
from .guard import is_held
from .merging import Replica, merge
from .optimizer import (
    LossScale,
    build_optimizer,
    finish_step,
    no_decay_names,
    read_learning_rate,
    set_learning_rate,
)
from .precision import DTYPES, Observer, Stepped, names_of, round_at_use
from .protocol import StepResult, extend_receipt, make_receipt
from .replica_state import ReplicaState
from .schedule import learning_rate
from .state import num_held
from .step_queue import LocalRow, StartedStep, StepRow
from .step_results import step_result
from .tally import Tally

ROUNDING = 2.0**-23  # of an fp32 number, relative
UNREAD = 1000  # drifts that may wait on the device


class _Pass(NamedTuple):
    """Holds what one replica's forward and backward passes gave."""

    tally: Tally
    expected: int | float  # targets, by which the loss was divided
    norm: torch.Tensor | float


class ReplicaEngine(ReplicaState):
    """Trains replicas of a model, each on its own share of the global batch.

    Every `merge_every` optimizer steps (None: never), and once more after the last step, their
    parameters and floating-point buffers are averaged. Each replica is weighted by the samples it
    saw since the last merge (federated averaging, McMahan et al. 2017,
    https://arxiv.org/abs/1602.05629). moved: see `_move_weights`. shares: how many data-parallel
    ranks one replica plays, each of which has a share of each batch."""

    def __init__(
        self,
        job: Job,
        placement: Placement,
        layers: Layers,
        loss: Loss,
        merge_every: int | None = None,
        replicas: int = 1,
        moved: int | None = None,
        shares: int = 1,
    ) -> None:
        super().__init__(job, placement, loss)
        self.merge_every, self.moved = merge_every, moved
        self.observer = Observer(layers, job.train.compile)
        no_decay = no_decay_names(layers, job.optimizer.no_decay)
        whole = layers.whole()
        layers.fill(whole)
        first = whole.to(self.device)
        self.models = [first, *(copy.deepcopy(first) for _ in range(replicas - 1))]
        self.model = first
        self.num_held = replicas * num_held(first)
        self.optimizers = [
            build_optimizer(job, dict(m.named_parameters()), no_decay) for m in self.models
        ]
        self.scales = [LossScale(job, self.device) for _ in self.models]
        self.buffers = names_of(first.buffers())
        floats = (buffer for buffer in first.buffers() if buffer.is_floating_point())
        self.finite = all(bool(buffer.isfinite().all()) for buffer in floats)  # not a mask of -inf
        for model in self.models:
            round_at_use(model, DTYPES[job.train.precision])
        self.replicas = [Replica(model) for model in self.models] if merge_every else []
        self.shares_each = shares
        if replicas * shares > 1:
            self.shares = tuple(range(replicas * shares))
        self.seen = [0] * replicas  # samples of each replica here since the last merge
        self.all_seen: int | None = 0  # of all ranks' replicas, None: it is not known here
        self.merges = 0
        self.drifts: list[tuple[int, torch.Tensor]] = []  # with their steps, not read yet
        self.drift: list[dict[str, float]] = []

    def _step(self, micro_batches: Sequence[MicroBatch], own: int | float) -> None:
        """Make one step of each replica alone, by the mean loss over its own targets."""
        each, scale = len(micro_batches) // len(self.models), self.scales[0].value
        self._set_training(*self.models)
        parts = [micro_batches[i * each : (i + 1) * each] for i in range(len(self.models))]
        whole = own if each == len(micro_batches) else None
        passes: Iterable[_Pass] = (self._pass(i, part, whole) for i, part in enumerate(parts))
        held, rows = False, []
        if self.guard:  # all replicas step, or none, so the gradients of all wait for the verdict
            passes = list(passes)
            self.tallies = [one.tally for one in passes]
            held = is_held(self, *(one.norm for one in passes))
        for i, one in enumerate(passes):
            finish_step(self.optimizers[i], self.scales[i], held)
            rate = read_learning_rate(self.optimizers[i])
            rows.append(LocalRow(one.tally, one.expected, one.norm, rate))
            self.seen[i] += 0 if held else one.tally.samples
        self._note_step(rows, scale)
        if self.merge_every:
            self.all_seen = self._seen_by_all()
            if self._merges():
                self._merge()
        if self.moved is not None and self.step == 0:
            self._move_weights(self.moved)

    @torch.no_grad()
    def _move_weights(self, seed: int) -> None:
        """Move each weight by one rounding up or down, alike in all replicas.

        A control does this where its sums have no other orders: all that follows rounds
        otherwise."""
        for model in self.models:
            draw = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=draw).mul_(2).sub_(1)
                parameter.mul_(1 + signs.to(parameter.device) * ROUNDING)

    def skip_to(self, step: int) -> None:
        self.step = step - 1
        if self._merges():
            self._merge()
        self.step = step

    def _seen_by_all(self) -> int | None:
        """Return all ranks' samples since the last merge, with this step's, where all were told."""
        if self.all_seen is None or self._samples is None:
            return None
        return self.all_seen + self._samples

    def _merges(self) -> bool:
        """Tell whether the replicas are merged after this step."""
        done = self.step + 1
        last = done == self.job.train.steps
        return bool(self.merge_every) and (last or done % (self.merge_every or 1) == 0)

    def _takes_drift(self) -> bool:
        """Tell whether a step has been logged since the merge before this one, or this is the last.

        A drift takes more time than the merge itself; a run that logs each step has all of them."""
        every, done, last = self.job.log.every, self.step + 1, self.job.train.steps
        before = (done - 1) // (self.merge_every or 1) * (self.merge_every or 1)
        return done == last or before == 0 or before // every < done // every

    def _number_to_send(
        self, micro_batches: Sequence[MicroBatch], own: int | float, count: int | float | None
    ) -> int | float | None:
        """Before a merge the ranks tell one another how many samples they saw since the last."""
        if not self._merges() or len(self.models) > 1 or self.guard:
            return None  # with a guard it is not known before the step whether they count
        if self._seen_by_all() is not None:
            return None
        return self.seen[0] + sum(micro_batch.ids.shape[0] for micro_batch in micro_batches)

    def _pass(
        self, i: int, micro_batches: Sequence[MicroBatch], count: int | float | None
    ) -> _Pass:
        """Take and clip the gradients of one replica."""
        model, optimizer, scale = self.models[i], self.optimizers[i], self.scales[i]
        tally = Tally(self.device)
        count = self._count_own(micro_batches) if count is None else count
        each = len(micro_batches) // self.shares_each
        buffers = SharesInTurn(model) if self.shares_each > 1 else None
        for n, micro_batch in enumerate(micro_batches):
            share, k = divmod(n, each)
            if buffers and share and k == 0:
                buffers.end_share()
            loss_sum = self._forward(model, micro_batch, (self.shares[i + share], k, 0), tally)
            self.backward(loss_sum, 1 / (count or 1), scale)
        if buffers:
            buffers.end_step()
        set_learning_rate(optimizer, learning_rate(self.job, self.step))
        if scale.active:
            scale.unscale(optimizer)
        return _Pass(tally, count, self._clip_gradients(optimizer))

    def _result(self, step: StartedStep, rows: list[StepRow]) -> StepResult:
        """Give several replicas the root mean square of their norms.

        Raises RunError if a merge took other samples for those of all ranks."""
        norm = rows[0].norm
        if len(rows) > 1:
            norm = math.sqrt(sum(row.norm**2 for row in rows) / len(rows))
        result = step_result(step, rows, [norm] * len(rows))
        if self.merge_every and step.samples not in (None, result.samples):
            had = f"the ranks had {result.samples} samples"
            raise RunError(f"{had}, and {step.samples} were announced")
        return result

    def _merge(self) -> None:
        """Replace every replica by their weighted mean, and note how far each was from it."""
        if not (weights := self._weights()):
            return  # the replicas are what they were then
        drift = merge(self.replicas, weights, self.finite, self._takes_drift())
        if drift is not None:
            self.drifts.append((self.step, drift))
        if len(self.drifts) == UNREAD:
            self._read_drift()
        self.seen, self.all_seen, self.merges = [0] * len(self.seen), 0, self.merges + 1

    def _weights(self) -> list[float]:
        """Return the weight of each replica here: its samples over the mean; collective.

        It is empty where the guard has held every step since the last merge."""
        if self.guard:
            total: float = sum(n for row in gather_rows(self.seen) for n in row)
        elif self.all_seen is not None:
            total = self.all_seen
        else:
            every: Sequence[float] = self.seen if len(self.seen) > 1 else self.queue.sent()
            total = sum(every)
        # Around 1, divided at the end: equal shares then lose nothing to a rounded 1/3.
        return [n * self.layout.dp / total for n in self.seen] if total else []

    def _show(self, batches: Iterable[Sequence[MicroBatch]]) -> None:
        super().evaluate(batches)

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        self._require_merged()
        return super().evaluate(batches)

    def weights(self) -> list[Piece]:
        self._require_merged()
        return super().weights()

    def _require_merged(self) -> None:
        if self.merge_every and any(self.seen) and self.layout.dp > 1:
            raise RunError(f"replicas stepped alone since the last merge (step {self.step})")

    def receipt(self) -> Receipt:
        groups = gather_objects(dist.is_initialized() and dist.get_world_size())
        replicas = len(self.models) * len(groups)
        evidence = {
            "model": type(self.model).__name__,
            "replicas": replicas,
            "parameters_per_replica": sum(p.numel() for p in self.model.parameters()),
            "gradient_collectives": "none",
        }
        if self.shares_each > 1:
            evidence["shares_per_replica"] = self.shares_each
        held = replicas * self.shares_each == self.layout.dp
        receipt = make_receipt(evidence, {f"{self.layout.dp} shares": held})
        receipt = self._add_ledger(receipt, Stepped.plain(self.optimizers[0], self.gradients))
        if self.merge_every is None:
            return receipt
        self._read_drift()
        merges = {
            "merge_every": self.merge_every,
            "merges": self.merges,
            "sample_digest_by_rank": list(self.digests),
            "drift": self.drift,
        }
        ran_alone = any(d["max_relative_drift"] != 0 for d in self.drift) or not self.drift
        differ = {"replicas differ before merges": ran_alone or self.layout.dp == 1}
        return extend_receipt(receipt, merges, differ)

    def close(self) -> None:
        self.model, self.models, self.replicas, self.optimizers = None, [], [], []
