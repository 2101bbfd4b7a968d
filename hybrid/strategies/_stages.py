"""Drives a DeepSpeed pipeline: the engine behind `pipeline` and `2d`, and where their layers go."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..config import Job, Pipeline
from ..data.batches import MicroBatch
from ..layout import Layout, Ranks, micro_batch_size
from ..models.losses import Loss
from ..processes import device, gather_objects, gather_rows
from ..records import EvalResult, Receipt
from ..schedule import learning_rate
from . import _deepspeed, _torch
from ._partition import partition
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
        layers: list[nn.Module],
        loss: Loss,
        settings: Pipeline,
        zero_stage: int,
        config: dict[str, Any],
    ) -> None:
        self.job, self.layout, self.loss, self.zero_stage = job, layout, loss, zero_stage
        rank = Ranks.from_env().rank
        self.stage = layout.stage(rank)
        self.shares = (layout.dp_rank(rank),)
        self.micro_batches = config["gradient_accumulation_steps"]
        self.micro_batch_size = micro_batch_size(
            job.train.global_batch, layout.dp, self.micro_batches
        )
        sizes = [sum(p.numel() for p in x.parameters() if p.requires_grad) for x in layers]
        self.parts = partition(settings.partition, sizes, layout.pp)
        self.num_layers = len(layers)
        own = nn.Sequential(OrderedDict((str(i), layers[i]) for i in self.parts[self.stage]))
        if zero_stage == 0:
            # In fp32 without ZeRO, DeepSpeed 0.19 takes the norm of the first stage alone, clips
            # stages differently and reports None: clipping is done here, over all stages.
            # test_workarounds.py tells when that is mended.
            config = config | {"gradient_clipping": 0.0}
        self.engine = _deepspeed.make_pipeline(job, layout, own, self._take_loss, config)
        if zero_stage == 0:
            _deepspeed.wrap_optimizer_step(self.engine, self._clip)
        self.device = device()
        self.tally = _torch.Tally(self.device)
        self.input_digest = self.step = 0
        self.norm = self.scale = math.nan
        self.digests: tuple[str, ...] = ()

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """See `Engine`."""
        last = self.stage == self.layout.pp - 1
        mine = sum(_torch.count_targets(self.loss, mb) for mb in micro_batches) if last else 0
        count = sum(int(row[0]) for row in gather_rows([mine]))
        # DeepSpeed divides by the micro-batches and averages over columns: undo both.
        self.scale = self.micro_batches * self.layout.dp / max(1, count)
        self.tally, self.input_digest = _torch.Tally(self.device), 0
        _torch.set_learning_rate(self.engine.optimizer, learning_rate(self.job, self.step))
        self.engine.train_batch(self._feed(micro_batches))
        self.step += 1
        if self.zero_stage:
            self.norm = float(self.engine.get_global_grad_norm())
        rate = _torch.read_learning_rate(self.engine.optimizer)
        rows = gather_rows([*self.tally.row(), self.input_digest, self.norm, rate])
        result = _torch.step_result(rows, count)
        self._check_inputs(rows, result)
        self.digests = self.digests or result.digest_by_rank
        return result

    def _feed(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Any]:
        for micro_batch in micro_batches:
            if self.stage == 0:
                digest = self.input_digest + _torch.hash_ids(micro_batch.ids)
                self.input_digest = digest % 2**64
            yield micro_batch.input, (micro_batch.target, micro_batch.ids)

    def _take_loss(self, output: Any, labels: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """DeepSpeed's loss function, on the last stage, in training and in evaluation."""
        target, ids = labels
        micro_batch = MicroBatch(None, target, ids)
        training = torch.is_grad_enabled()
        loss_sum = self.tally.add(self.loss, output, micro_batch, score=not training)
        return loss_sum * self.scale if training else loss_sum

    def _clip(self, engine: Any) -> None:
        """Global norm over all stages, and clipping by it, once gradients are reduced."""
        grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
        square = nn.utils.get_total_norm(grads).double().square()
        dist.all_reduce(square, group=engine.grid.get_pipe_parallel_group())
        norm = square.sqrt()
        self.norm = float(norm)
        if self.job.train.clip_norm:
            parameters = [p for p in engine.module.parameters() if p.grad is not None]
            nn.utils.clip_grads_with_norm_(parameters, self.job.train.clip_norm, norm.float())

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

    def _own_tensors(self) -> dict[str, torch.Tensor]:
        """This stage's tensors by canonical name: DeepSpeed puts the stage's number in front."""
        tensors = _torch.named_tensors(self.engine.module)
        return {name.partition(".")[2]: t for name, t in tensors.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """See `Engine`. The first column's stages send theirs to rank 0, tensor by tensor."""
        own = self._own_tensors()
        rank = Ranks.from_env().rank
        mine = {n: (tuple(t.shape), t.dtype) for n, t in own.items()} if self.shares == (0,) else {}
        full: dict[str, torch.Tensor] = {}
        for owner, tensors in enumerate(gather_objects(mine)):
            for name, (shape, dtype) in tensors.items():
                if rank == owner == 0:
                    full[name] = own[name].detach().cpu().clone()
                elif rank == owner:
                    dist.send(own[name].detach().contiguous(), 0)
                elif rank == 0:
                    buffer = torch.empty(shape, dtype=dtype, device=self.device)
                    dist.recv(buffer, owner)
                    full[name] = buffer.cpu()
        return dict(sorted(full.items(), key=lambda item: int(item[0].split(".")[0])))

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Engine`."""
        own = self._own_tensors()
        _torch.copy_state(own, {n: t for n, t in state.items() if n in own})
        if self.zero_stage:
            self.engine.optimizer.refresh_fp32_params()

    def receipt(self) -> Receipt:
        """See `Engine`: every rank's stage, the layers it holds, and their parameters."""
        own = [n for part in self.engine.module.children() for n, _ in part.named_children()]
        mine = {
            "stage": self.engine.stage_id,
            "column": self.engine.grid.get_data_parallel_id(),
            "layers": [int(name) for name in own],
            "parameters": sum(p.numel() for p in self.engine.module.parameters()),
        }
        ranks = gather_objects(mine)
        evidence: dict[str, Any] = {
            "model": type(self.engine).__name__,
            "stages": self.engine.num_stages,
            "columns": self.engine.dp_world_size,
            "zero_stage": int(self.engine.zero_optimization_stage()),
            "ranks": ranks,
            "layers_by_stage": [r["layers"] for r in ranks if r["column"] == 0],
            "sample_digest_by_rank": list(self.digests),
        }
        lay = self.layout
        held = [layer for r in ranks if r["column"] == 0 for layer in r["layers"]]
        conditions = {
            f"{lay.pp} stages": evidence["stages"] == lay.pp,
            f"{lay.dp} columns": evidence["columns"] == lay.dp,
            f"ZeRO stage {self.zero_stage}": evidence["zero_stage"] == self.zero_stage,
            "every stage where the layout puts it": all(
                (r["stage"], r["column"]) == (lay.stage(i), lay.dp_rank(i))
                for i, r in enumerate(ranks)
            ),
            "every layer on one stage, in order": held == list(range(self.num_layers)),
            "columns alike": all(
                r["layers"] == evidence["layers_by_stage"][r["stage"]] for r in ranks
            ),
        }
        return make_receipt(evidence, conditions)

    def close(self) -> None:
        """See `Engine`."""
        self.engine.destroy()
