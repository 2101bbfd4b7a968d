"""Drives a DeepSpeed pipeline: the engine behind `pipeline` and `2d`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config import Job, Pipeline
from ..data.batches import MicroBatch
from ..launchers import Ranks
from ..layout import Layout, micro_batch_size
from ..models.layers import Layers
from ..models.losses import Loss
from ..processes import device, gather_objects, gather_rows
from ..records import EvalResult, Receipt
from ..schedule import learning_rate
from . import _deepspeed, _model, _optimizer, _pipe, _precision, _torch
from ._cut import Cut
from .base import RunError, StepResult, make_receipt


class StageEngine:
    """One stage of a pipeline in one data-parallel column.

    The first stage reads inputs, the last reads targets; each digests the sample ids it read, since
    DeepSpeed would not notice two different batches (deepspeedai/DeepSpeed#5729).
    """

    micro_batch_size: int | None
    shares: tuple[int, ...]

    def __init__(
        self,
        job: Job,
        layout: Layout,
        layers: Layers,
        loss: Loss,
        settings: Pipeline,
        zero_stage: int,
        config: dict[str, Any],
    ) -> None:
        self.job, self.layout, self.loss = job, layout, loss
        self.zero_stage = _deepspeed.pipeline_stage(job, zero_stage)
        rank = Ranks.from_env().rank
        self.stage = layout.stage(rank)
        self.shares = (layout.dp_rank(rank),)
        self.micro_batches = config["gradient_accumulation_steps"]
        self.micro_batch_size = micro_batch_size(
            job.train.global_batch, layout.dp, self.micro_batches
        )
        self.cut = Cut(layers, settings.partition, layout, rank)
        self.observer = _precision.Observer(layers)
        self.engine = self._build(layers, config)
        self.num_held = _torch.num_held(self.engine.module)
        self.device = device()
        self.tally = _torch.Tally(self.device)
        self.input_digest = self.step = 0
        self.norm = self.scale = math.nan
        self.digests: tuple[str, ...] = ()
        self.gradients = ""
        self.pending: list[torch.Tensor] = []

    def _build(self, layers: Layers, config: dict[str, Any]) -> Any:
        """DeepSpeed's engine around this rank's layers; the others are let go."""
        spared = _optimizer.spared_names(layers, self.job.optimizer.no_decay)
        # Under ZeRO, DeepSpeed reduces a norm over the stages for each parameter group: a stage
        # with fewer groups than its neighbours would leave them waiting.
        num_groups = _optimizer.count_groups(layers, spared)
        own = layers.join(self.cut.part)
        own.register_forward_pre_hook(self._draw)
        self.buffers = _precision.names_of(own.buffers())
        parameters = self.cut.parameters(own)
        optimizer = _optimizer.build_optimizer(self.job, parameters, spared, num_groups)
        if self.zero_stage == 0:
            # In fp32 without ZeRO, DeepSpeed 0.19 takes the norm of the first stage alone, clips
            # stages differently and reports None: clipping is done here, over all stages.
            # test_workarounds.py tells when that is mended.
            config = config | {"gradient_clipping": 0.0}
        engine = _pipe.make_pipeline(self.job, self.layout, own, self._take_loss, config, optimizer)
        _pipe.tie(engine, self.cut.tied())
        if self.zero_stage == 0:
            _pipe.wrap_optimizer_step(engine, self._clip)
            _pipe.reduce_in_buckets(engine)
        return engine

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """See `Engine`."""
        last = self.stage == self.layout.pp - 1
        mine = sum(_torch.count_targets(self.loss, mb) for mb in micro_batches) if last else 0
        count = sum(int(row[0]) for row in gather_rows([mine]))
        # DeepSpeed divides by the micro-batches and averages over columns: undo both.
        self.scale = self.micro_batches * self.layout.dp / max(1, count)
        self.tally, self.input_digest = _torch.Tally(self.device), 0
        self.pending = [micro_batch.ids for micro_batch in micro_batches]
        optimizer = self.engine.optimizer
        loss_scale = float(optimizer.loss_scale) if self.job.train.precision == "fp16" else None
        _optimizer.set_learning_rate(optimizer, learning_rate(self.job, self.step))
        self.engine.train_batch(self._feed(micro_batches))
        self.step += 1
        self.observer.stop()
        if self.zero_stage:
            norm = self.engine.get_global_grad_norm()
            self.norm = math.inf if optimizer.overflow else float(norm)
        rate = _optimizer.read_learning_rate(optimizer)
        rows = gather_rows([*self.tally.row(), self.input_digest, self.norm, rate])
        result = _torch.step_result(rows, count, loss_scale)
        self._check_inputs(rows, result)
        self.digests = self.digests or result.digest_by_rank
        return result

    def _feed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Any]:
        for micro_batch in micro_batches:
            if self.stage == 0:
                digest = self.input_digest + _torch.hash_ids(micro_batch.ids)
                self.input_digest = digest % 2**64
            yield micro_batch.input, (micro_batch.target, micro_batch.ids)

    def _draw(self, module: nn.Module, args: Any) -> None:
        """Before each forward pass of this stage: DeepSpeed runs the micro-batches in order."""
        if module.training and self.pending:
            number = self.micro_batches - len(self.pending)
            place = (*self.shares, number, self.stage)
            ids, rows = self.pending.pop(0), self.micro_batch_size or 1
            _model.draw(self.job, self.step, place, ids, rows)

    def _take_loss(self, output: Any, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """DeepSpeed's loss function, on the last stage, in training and in evaluation."""
        target, ids = labels
        micro_batch = MicroBatch(None, target, ids)
        training = torch.is_grad_enabled()
        loss_sum = self.tally.add(self.loss, output, micro_batch, score=not training)
        return loss_sum * self.scale if training else loss_sum

    def _clip(self, engine: Any) -> None:
        """Global norm over all stages, and clipping by it, once gradients are reduced. A parameter
        that several stages hold counts on the first."""
        parameters = list(engine.module.parameters())
        counted = [p for p in parameters if not p.ds_pipe_replicated]
        stages = engine.grid.get_pipe_parallel_group()
        self.norm = _optimizer.global_norm(counted, stages)
        self.gradients = self.gradients or _torch.gradient_dtypes(engine.module)
        _optimizer.clip(parameters, self.norm, self.job.train.clip_norm)

    def _check_inputs(self, rows: Sequence[Sequence[int | float]], result: StepResult) -> None:
        inputs = f"{sum(int(row[7]) for row in rows) % 2**64:016x}"
        if inputs != result.sample_digest:
            raise RunError(
                f"step {self.step - 1}: the first stage's inputs (digest {inputs}) and the last "
                f"stage's targets (digest {result.sample_digest}) are of different samples"
            )

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        """See `Engine`."""
        self.tally = _torch.Tally(self.device)
        for micro_batches in batches:
            self.engine.eval_batch(
                self._feed(micro_batches),
                reduce_output=None,
                bcast_loss=False,
                num_micro_batches=len(micro_batches),
            )
        return _torch.eval_result(self.tally.row())

    def state(self) -> dict[str, torch.Tensor]:
        """See `Engine`. The first column's stages send theirs to rank 0, tensor by tensor."""
        own = {
            name: _deepspeed.full_tensor(tensor)
            for name, tensor in self.cut.own_tensors(self.engine.module, shared=False).items()
        }
        rank = Ranks.from_env().rank
        mine = {n: (tuple(t.shape), t.dtype) for n, t in own.items()} if self.shares == (0,) else {}
        full: dict[str, torch.Tensor] = {}
        for owner, tensors in enumerate(gather_objects(mine)):
            for name, (shape, dtype) in tensors.items():
                if rank == owner == 0:
                    full[name] = own[name]
                elif rank == owner:
                    dist.send(own[name].to(self.device).contiguous(), 0)
                elif rank == 0:
                    buffer = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(buffer, owner)
                    full[name] = buffer.cpu()
        return full

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`."""
        own = self.cut.own_tensors(self.engine.module, shared=True)
        mine = {name: state[name] for name in own if name in state}
        _torch.copy_state(own, mine)
        if self.zero_stage:
            _deepspeed.set_masters(own, mine)

    def receipt(self) -> Receipt:
        """See `Engine`: every rank's stage, the layers it holds, and their parameters."""
        live = self.engine
        ledger = _precision.ledger(self.observer, live.module, self._stepped())
        mine = {
            "stage": live.stage_id,
            "column": live.grid.get_data_parallel_id(),
            "layers": self.cut.live_layers(live.module),
            "parameters": sum(p.numel() for p in live.module.parameters()),
            "tied": self.cut.tied_digest(),
        }
        ranks = gather_objects(mine)
        first = [r for r in ranks if r["column"] == 0]
        evidence: dict[str, Any] = {
            "model": type(live).__name__,
            "stages": live.num_stages,
            "columns": live.dp_world_size,
            "zero_stage": int(live.zero_optimization_stage()),
            "ranks": ranks,
            "layers_by_stage": [r["layers"] for r in first],
            "tensors_by_stage": [
                names
                for column, names in zip(
                    [r["column"] for r in ranks],
                    gather_objects(list(self.cut.own_tensors(live.module, shared=True))),
                    strict=True,
                )
                if column == 0
            ],
            "sample_digest_by_rank": list(self.digests),
            "precision": ledger,
        }
        return make_receipt(evidence, self._conditions(evidence))

    def _stepped(self) -> _precision.Stepped:
        if self.zero_stage == 0:
            return _precision.Stepped.plain(self.engine.optimizer, self.gradients)
        return _deepspeed.stepped(self.engine.optimizer)

    def _conditions(self, evidence: Mapping[str, Any]) -> dict[str, bool]:
        lay, ranks = self.layout, evidence["ranks"]
        return {
            f"{lay.pp} stages": evidence["stages"] == lay.pp,
            f"{lay.dp} columns": evidence["columns"] == lay.dp,
            f"ZeRO stage {self.zero_stage}": evidence["zero_stage"] == self.zero_stage,
            "every stage where the layout puts it": all(
                (r["stage"], r["column"]) == (lay.stage(i), lay.dp_rank(i))
                for i, r in enumerate(ranks)
            ),
            "every layer on its stage": evidence["layers_by_stage"] == self.cut.layers_by_stage,
            "columns alike": all(
                r["layers"] == evidence["layers_by_stage"][r["stage"]] for r in ranks
            ),
            "tied weights equal on all stages": self.cut.tied_agree([r["tied"] for r in ranks]),
            **_precision.check_ledger(
                self.job.train.precision, self.buffers, evidence["precision"]
            ),
        }

    def close(self) -> None:
        """See `Engine`."""
        self.engine.destroy()
