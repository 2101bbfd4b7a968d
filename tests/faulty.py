"""Plants one fault in the toolkit or its engines, then runs the command: `faulty.py FAULT ...`.

Each fault is what a bug would do; the tests start runs through this file and expect each caught.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def not_divided_by_accumulation() -> None:
    """The loss is not divided by the number of micro-batches."""
    from hybrid.engines.accelerated import AcceleratedEngine

    backward = AcceleratedEngine._backward

    def too_large(self: Any, loss_sum: torch.Tensor, micro_batches: int) -> None:
        backward(self, loss_sum * micro_batches, micro_batches)

    AcceleratedEngine._backward = too_large  # type: ignore[method-assign]


def stage_not_divided_by_accumulation() -> None:
    """The same in a pipeline, whose loss is taken elsewhere."""
    from hybrid.engines.pipeline_stage import Stage

    take = Stage._take_loss

    def too_large(self: Any, output: Any) -> torch.Tensor:
        return take(self, output) * self.micro_batches

    Stage._take_loss = too_large  # type: ignore[method-assign]


def mask_on_the_first_stage_alone() -> None:
    """The stages after the first get a module's inputs without the mask."""
    from hybrid.engines.pipeline_stage import Stage

    start = Stage._start

    def without_mask(self: Any, module: Any, args: Any) -> Any:
        result = start(self, module, args)
        if self.stage:
            module.stage_inputs = {"input_ids": module.stage_inputs["input_ids"]}
        return result

    Stage._start = without_mask  # type: ignore[method-assign]


def same_samples_on_two_ranks() -> None:
    """Rank 1 computes rank 0's share."""
    _share_ids(lambda share, step: (0 if share == 1 else share, step))


def samples_of_another_step() -> None:
    """Rank 1 computes its share of the next step's batch."""
    _share_ids(lambda share, step: (share, step + 1 if share == 1 else step))


def _share_ids(change: Callable[[int, int], tuple[int, int]]) -> None:
    from hybrid.data.batches import BatchPlan

    ids = BatchPlan.micro_batch_arrays

    def others(self: Any, step: int, share: int) -> Any:
        share, step = change(share, step)
        return ids(self, step, share)

    BatchPlan.micro_batch_arrays = others  # type: ignore[method-assign]


def targets_of_another_batch() -> None:
    """The last stage reads its targets from another order of the batch than the first stage."""
    import dataclasses

    from hybrid.engines.pipeline_stage import Stage

    feed = Stage._feed

    def shifted(self: Any, micro_batches: Any) -> None:
        if self.stage:
            other = [(mb.ids + 1) % 100 for mb in micro_batches]
            pairs = zip(micro_batches, other, strict=True)
            micro_batches = [dataclasses.replace(mb, ids=ids) for mb, ids in pairs]
        feed(self, micro_batches)

    Stage._feed = shifted  # type: ignore[method-assign]


def rank_skips_all_reduce() -> None:
    """Rank 1 takes part in DDP's all-reduce and keeps its own gradient."""
    from torch.nn.parallel import DistributedDataParallel

    init = DistributedDataParallel.__init__

    def hook(state, bucket):  # noqa: ANN001, ANN202 - torch refuses annotations that are texts
        mine = bucket.buffer().clone()
        mean = bucket.buffer().div_(torch.distributed.get_world_size())
        work = torch.distributed.all_reduce(mean, async_op=True)
        keep = torch.distributed.get_rank() == 1
        return work.get_future().then(lambda f: mine if keep else f.value()[0])

    def hooked(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self.register_comm_hook(None, hook)

    DistributedDataParallel.__init__ = hooked  # type: ignore[method-assign]


def stage_with_another_rate() -> None:
    """Stage 1's optimizer is given ten times the learning rate."""
    from hybrid.engines import pipeline_deepspeed, pipeline_torch
    from hybrid.launch.placement import find_placement

    give = pipeline_deepspeed.set_learning_rate

    def larger(optimizer: Any, lr: float) -> None:
        give(optimizer, lr * 10 if find_placement().rank == 1 else lr)

    pipeline_deepspeed.set_learning_rate = pipeline_torch.set_learning_rate = larger


def stage_with_larger_updates() -> None:
    """Stage 1 steps ten times as far, and its optimizer shows the right rate all the same."""
    from hybrid.engines import pipeline_deepspeed, pipeline_torch
    from hybrid.launch.placement import find_placement

    build = pipeline_deepspeed.build_optimizer

    def farther(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build(*arguments)
        if find_placement().rank == 1:
            step = optimizer.step

            def ten_times(*arguments: Any, **options: Any) -> Any:
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad.mul_(10)
                return step(*arguments, **options)

            optimizer.step = ten_times  # type: ignore[method-assign]
        return optimizer

    pipeline_deepspeed.build_optimizer = pipeline_torch.build_optimizer = farther


def other_initial_weight() -> None:
    """One weight of the whole model starts elsewhere."""
    from hybrid.training import beginning

    build = beginning.build_shared

    def nudged(*arguments: Any) -> Any:
        layers, loss = build(*arguments)
        with torch.no_grad():
            layers[1].weight[0, 0] += 1e-3
        return layers, loss

    beginning.build_shared = nudged


def deepspeed_clips_alone() -> None:
    """A pipeline without ZeRO is left to DeepSpeed's own clipping."""
    from hybrid.engines import base, pipeline_deepspeed

    make = pipeline_deepspeed.make_pipeline

    def clipping(job: Any, placement: Any, stage: Any, loss: Any, config: Any, *more: Any) -> Any:
        config = config | {"gradient_clipping": job.train.clip_norm}
        return make(job, placement, stage, loss, config, *more)

    base.clip = lambda *_: None  # the norm is still taken
    pipeline_deepspeed.make_pipeline = clipping


def fsdp_falls_back() -> None:
    """Accelerate is left to itself on a host without a GPU: it trains DDP and says nothing."""
    from hybrid.engines import accelerator

    accelerator._keep_fsdp = lambda *_: None


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if "single" not in sys.argv:  # the reference stays whole
        globals()[fault]()
    from hybrid.cli import main

    main()
