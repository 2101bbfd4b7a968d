"""Runs the command line with one fault planted: `-m benchmarks.verdict_campaign.planted FAULT ...`.

FAULT is the JSON of `kinds.Fault`. Only ranks of its strategy carry it. The reference and its
controls, which are single processes, stay whole. Each fault is what a bug would do, done where no
check of the run itself looks: the numbers that a run shows of itself are those of a right run,
until the weights that the fault changed tell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hybrid.engines import base, merging, pipeline_stage

from .kinds import Fault
from .layer_faults import change_layers, scale_output, start_apart
from .plant import Plant

Groups = list[dict[str, Any]]


def _around_update(
    plant: Plant,
    before: Callable[[torch.optim.Optimizer], Any],
    after: Callable[[torch.optim.Optimizer, Any], None] = lambda *_: None,
) -> None:
    """Call `before` ahead of torch's update where the fault acts, and `after` behind it, with what
    `before` returned. DeepSpeed updates group by group, so that a step can have several calls."""
    kept: list[Any] = []

    def first(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kept.append((before(optimizer),) if plant.acts() else None)

    def then(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if (found := kept.pop()) is not None:
            after(optimizer, found[0])

    register_optimizer_step_pre_hook(first)
    register_optimizer_step_post_hook(then)


def _scale_in_groups(plant: Plant, key: str, chosen: Callable[[dict[str, Any]], bool]) -> None:
    """Scale a setting of the chosen parameter groups during the update alone."""

    def before(optimizer: torch.optim.Optimizer) -> list[float]:
        found = [group[key] for group in optimizer.param_groups]
        for group in filter(chosen, optimizer.param_groups):
            group[key] *= plant.fault.size
        return found

    def after(optimizer: torch.optim.Optimizer, found: list[float]) -> None:
        for group, value in zip(optimizer.param_groups, found, strict=True):
            group[key] = value

    _around_update(plant, before, after)


def _rate_of_one_rank(plant: Plant) -> None:
    _scale_in_groups(plant, "lr", lambda _: plant.is_last_stage())


def _rate_of_one_group(plant: Plant) -> None:
    _scale_in_groups(plant, "lr", lambda group: group["weight_decay"] == 0.0)


def _decay_twice(plant: Plant) -> None:
    _scale_in_groups(plant, "weight_decay", lambda _: True)


def _values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List what this rank holds of the parameters that are updated."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in parameters]


def _update_lost(plant: Plant) -> None:
    """Take back the update of the first quarter of one tensor, or of a flat partition."""

    def part(optimizer: torch.optim.Optimizer) -> torch.Tensor:
        tensors = [t for t in _values(optimizer) if t.numel()]
        flat = tensors[plant.fault.tensor % len(tensors)].view(-1)
        return flat[: -(-len(flat) // 4)]

    def after(optimizer: torch.optim.Optimizer, found: torch.Tensor | None) -> None:
        if found is not None:
            part(optimizer).copy_(found)

    def before(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        return part(optimizer).clone() if any(t.numel() for t in _values(optimizer)) else None

    _around_update(plant, before, after)


def _last_step_not_made(plant: Plant) -> None:
    def after(optimizer: torch.optim.Optimizer, found: list[torch.Tensor]) -> None:
        for tensor, value in zip(_values(optimizer), found, strict=True):
            tensor.copy_(value)

    _around_update(plant, lambda optimizer: [t.clone() for t in _values(optimizer)], after)


def _state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """List the state of the parameters that are updated, where they have one yet."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [optimizer.state[p] for p in parameters if optimizer.state.get(p)]


def _adam_step_off(plant: Plant) -> None:
    def before(optimizer: torch.optim.Optimizer) -> None:
        for state in _state_of(optimizer):
            state["step"] += 1

    _around_update(plant, before)


def _state_lost(plant: Plant) -> None:
    def before(optimizer: torch.optim.Optimizer) -> None:
        for state in _state_of(optimizer):
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].zero_()

    _around_update(plant, before)


def _gradient_rounded(plant: Plant) -> None:
    def before(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.copy_(parameter.grad.to(torch.bfloat16))

    _around_update(plant, before)


def _gradients_not_cleared(plant: Plant) -> None:
    clear = torch.optim.Optimizer.zero_grad

    def sometimes(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        if not plant.acts():
            clear(self, set_to_none)

    torch.optim.Optimizer.zero_grad = sometimes  # type: ignore[method-assign]


def _clipped_by_part(plant: Plant) -> None:
    """Clip by the norm that is left when half of the squares are left out."""
    clip, part = base.clip, 0.5**0.5

    def by_part(parameters: Any, norm: torch.Tensor, limit: float) -> None:
        clip(parameters, norm * part if plant.acts() else norm, limit)

    base.clip = by_part
    if plant.fault.strategy not in ("zero1", "zero2", "zero3", "2d"):
        return
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for kind in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        whole = kind.unscale_and_clip_grads

        def scaled(self: Any, what: Any, norm: Any, *more: Any, whole: Any = whole) -> Any:
            return whole(self, what, norm * part if plant.acts() else norm, *more)

        kind.unscale_and_clip_grads = scaled


def _other_dropout(plant: Plant) -> None:
    """Have one rank seed its forward passes as those of another step."""

    def of_another_step(seed: Callable[..., Any]) -> Callable[..., Any]:
        def seeded(job: Any, step: int, *more: Any) -> Any:
            away = 1000 if plant.acts() and plant.is_here() else 0
            return seed(job, step + away, *more)

        return seeded

    base.sample_seeds = of_another_step(base.sample_seeds)
    pipeline_stage.set_sample_seeds = of_another_step(pipeline_stage.set_sample_seeds)


def _merge_incomplete(plant: Plant) -> None:
    gather = merging.Replica.gather

    def fewer(replica: merging.Replica) -> list[torch.Tensor]:
        *pieces, last = gather(replica)
        place = max(replica._places, key=lambda place: place.data_ptr())
        return [*pieces, last[: len(last) - place.numel() * plant.acts()]]

    merging.Replica.gather = fewer  # type: ignore[method-assign]


def _first_of_all(plant: Plant) -> None:
    change_layers(plant, 0, inputs=lambda x: x[:1].expand_as(x).contiguous())


def _shifted(plant: Plant) -> None:
    change_layers(plant, 0, inputs=lambda x: x.roll(1, 0))


PLANTS: dict[str, Callable[[Plant], None]] = {
    "gradient_not_reduced": lambda plant: scale_output(plant, tensor=True),
    "loss_scaled": lambda plant: scale_output(plant, everywhere=True),
    "sample_repeated": _first_of_all,
    "inputs_shifted": _shifted,
    "rate_of_one_rank": _rate_of_one_rank,
    "rate_of_one_group": _rate_of_one_group,
    "gradients_not_cleared": _gradients_not_cleared,
    "micro_batch_dropped": lambda plant: scale_output(plant, last_micro_batch=True),
    "clipped_by_part": _clipped_by_part,
    "decay_twice": _decay_twice,
    "update_lost": _update_lost,
    "start_apart": start_apart,
    "other_dropout": _other_dropout,
    "adam_step_off": _adam_step_off,
    "last_step_not_made": _last_step_not_made,
    "gradient_rounded": _gradient_rounded,
    "state_lost": _state_lost,
    "merge_incomplete": _merge_incomplete,
}


def main() -> None:
    """Plant the fault if this is a rank that carries it, then run the command line."""
    fault = Fault(**json.loads(sys.argv.pop(1)))
    strategy = sys.argv[sys.argv.index("--strategy") + 1]
    if strategy == fault.strategy and os.environ.get("WORLD_SIZE") != "1":
        PLANTS[fault.kind](Plant(fault))
    from hybrid.cli import main as run

    run()


if __name__ == "__main__":
    main()
