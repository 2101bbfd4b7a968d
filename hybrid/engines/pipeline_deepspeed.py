"""This module drives a DeepSpeed pipeline: it has the engine behind `pipeline` and `2d`."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..data.loader import MicroBatch
from ..job.schema import Job
from ..launch.placement import Placement
from ..models.layers import Layers
from ..models.losses import Loss
from ..records import EvalResult, Receipt
from .deepspeed_setup import (
    full_config,
    hold_steps,
    loss_scale,
    norm_or_overflow,
    norm_switch,
    pipeline_stage,
    prepare_process,
    stepped,
)
from .guard import is_held, step_unless
from .optimizer import (
    build_optimizer,
    count_groups,
    read_learning_rate,
    rounds_by_place,
    set_learning_rate,
)
from .pipeline_instructions import (
    make_pipeline,
    reduce_in_buckets,
    tie,
    unmonitored,
    wrap_optimizer_step,
)
from .pipeline_stage import make_contiguous
from .pipeline_state import DeepSpeedStage
from .precision import Stepped
from .protocol import make_receipt
from .schedule import learning_rate
from .state import num_held
from .step_queue import LocalRow
from .tally import Tally, eval_result


class StageEngine(DeepSpeedStage):
    """Trains one stage of a pipeline in one data-parallel column, by DeepSpeed."""

    def __init__(
        self, job: Job, placement: Placement, layers: Layers, loss: Loss, name: str, zero_stage: int
    ) -> None:
        super().__init__(job, placement, layers, loss, name)
        prepare_process(placement)
        config = full_config(job, placement, layers, name, zero_stage)
        self.zero_stage = pipeline_stage(job, zero_stage)
        self.engine = self._build(layers, config)
        self.model = self.engine.module
        self.num_held = num_held(self.model)
        self.one_set = self._make_one_set()

    def _build(self, layers: Layers, config: dict[str, Any]) -> Any:
        """Make DeepSpeed's engine with this rank's layers; the other layers are freed."""
        own, no_decay = self._own_module(layers)
        # Under ZeRO, DeepSpeed reduces a norm over the stages for each parameter group: a stage
        # with fewer groups than its neighbours would leave them waiting.
        num_groups = count_groups(layers, no_decay)
        own.register_forward_pre_hook(self._start)
        if not self.reads_targets:
            own.register_forward_hook(lambda module, args, output: make_contiguous(output))
        parameters = self.assignment.parameters(own)
        in_flat_buffers = self.assignment.has_ties and self.zero_stage > 0
        flat_ties = in_flat_buffers and rounds_by_place(layers, self.layout.dp)
        optimizer = build_optimizer(self.job, parameters, no_decay, num_groups, flat_ties)
        if self.zero_stage == 0:
            # In fp32 without ZeRO, DeepSpeed 0.19 takes the norm of the first stage alone, clips
            # stages differently and reports None. So clipping is done here, over all stages.
            # test_workarounds.py tells when DeepSpeed has corrected this.
            config = config | {"gradient_clipping": 0.0}
        self.frozen = self._keep_frozen(own)
        engine = make_pipeline(self.job, self.placement, own, self._take_loss, config, optimizer)
        self.frozen.group = engine.grid.get_data_parallel_group()
        tie(engine, self.assignment.tied())
        if self.zero_stage == 0:
            wrap_optimizer_step(engine, self._clip)
            reduce_in_buckets(engine)
        if self.guard and self.zero_stage:
            hold_steps(engine.optimizer, lambda norm: is_held(self, norm))
        elif self.guard:
            step_unless(engine.optimizer, lambda: is_held(self, self.norm))
        self.take_norm = norm_switch(engine.optimizer)
        return engine

    def _step(self, micro_batches: Sequence[MicroBatch], own: int | float) -> None:
        self._begin_step()
        optimizer = self.engine.optimizer
        scale = loss_scale(optimizer)
        set_learning_rate(optimizer, learning_rate(self.job, self.step))
        if self.zero_stage:
            self.take_norm(self.norm_is_due)
        self.engine.train_batch(self._give(micro_batches))
        if self.zero_stage and self.norm_is_due:
            self.norm = norm_or_overflow(optimizer, self.engine.get_global_grad_norm())
        rate = read_learning_rate(optimizer)
        row = LocalRow(self.tally, own, self.norm, rate, self.inputs)
        self._note_step([row], scale, bool(self.zero_stage or self.job.train.clip_norm))
        if self.one_set and not (self.guard and self.guard.fault):
            self.one_set.after_step()

    def _give(self, micro_batches: Sequence[MicroBatch]) -> Iterator[Any]:
        """Take the micro-batches that come next, and return DeepSpeed's, which are empty."""
        self._feed(micro_batches)
        nothing = torch.zeros(1)
        return iter([(nothing, nothing)] * len(micro_batches))

    def _take_loss(self, output: Any) -> torch.Tensor:
        loss_sum = super()._take_loss(output)
        if not torch.is_grad_enabled():
            return loss_sum
        # DeepSpeed divides by the micro-batches and averages over columns: undo both.
        return loss_sum * (self.micro_batches * self.layout.dp / (self._count_all() or 1))

    def _clip(self, engine: Any) -> None:
        """Clip reduced gradients by their global norm over all stages.
        A parameter that several stages hold counts on the first."""
        groups = [engine.grid.get_pipe_parallel_group()]
        self.norm = self._clip_gradients(
            engine.optimizer, groups, counts=lambda parameter: not parameter.ds_pipe_replicated
        )

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> EvalResult:
        self.tally = Tally(self.device, self.counter, self.metrics)
        if self.one_set:
            self.one_set.before_use()
        with unmonitored(self.engine):
            for micro_batches in batches:
                self.engine.eval_batch(
                    self._give(micro_batches),
                    reduce_output=None,
                    bcast_loss=False,
                    num_micro_batches=len(micro_batches),
                )
        return eval_result(self.tally)

    def receipt(self) -> Receipt:
        """Show every rank's stage, the layers it holds, and their parameters."""
        live, lay = self.engine, self.layout
        held, conditions = self._held(live.stage_id, live.grid.get_data_parallel_id())
        stages, columns = live.num_stages, live.dp_world_size
        zero_stage = int(live.zero_optimization_stage())
        evidence = {
            "model": type(live).__name__,
            "stages": stages,
            "columns": columns,
            "zero_stage": zero_stage,
            **held,
        }
        conditions = {
            f"{lay.pp} stages": stages == lay.pp,
            f"{lay.dp} columns": columns == lay.dp,
            f"ZeRO stage {self.zero_stage}": zero_stage == self.zero_stage,
            **conditions,
        }
        plain = self.zero_stage == 0
        updated = (
            Stepped.plain(live.optimizer, self.gradients) if plain else stepped(live.optimizer)
        )
        return self._add_ledger(make_receipt(evidence, conditions), updated)

    def close(self) -> None:
        self.engine.destroy()
