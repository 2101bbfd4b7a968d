"""This module reads and sets what DeepSpeed counts, and fp16's loss scale, for a checkpoint."""

from collections.abc import Mapping
from typing import Any

_COUNTS = "cur_iter", "last_overflow_iter", "cur_hysteresis"


def read_loss_scale(scaler: Any) -> dict[str, float] | None:
    """Return the scale of fp16's loss scaler, and for how many good steps it has been in force.

    torch's scaler would then double it in the same step as this one. None: it is not fp16's."""
    if not getattr(scaler, "dynamic", False):
        return None
    since = scaler.cur_iter - scaler.last_overflow_iter - 1  # good steps since the last overflow
    # DeepSpeed doubles in the step that finds `scale_window` good ones before it; torch counts it.
    good = (since - 1) % scaler.scale_window if since else 0
    return {"scale": float(scaler.cur_scale), "good_steps": good}


def set_loss_scale(scaler: Any, state: Mapping[str, float] | None) -> None:
    """Take over what `read_loss_scale`, or torch's scaler under another strategy, returned."""
    if getattr(scaler, "dynamic", False) and state:
        scaler.cur_scale = float(state["scale"])
        scaler.cur_iter, scaler.last_overflow_iter = int(state["good_steps"]) + 1, -1


def scaler_of(live: Any) -> Any:
    """Return the loss scaler of DeepSpeed's engine; not all of its optimizers have one."""
    return getattr(live.optimizer, "loss_scaler", None)


def set_progress(
    live: Any, step: int, loss_scale: Mapping[str, float] | None, counts: Mapping[str, int]
) -> None:
    """Have DeepSpeed's engine go on after `step` steps: its profiler and its monitors count on.

    loss_scale, counts: what `read_loss_scale` and `read_counts` returned."""
    set_loss_scale(scaler_of(live), loss_scale)
    set_counts(scaler_of(live), counts)
    live.global_steps, live.micro_steps = step, step * live.gradient_accumulation_steps()
    live.global_samples = step * live.train_batch_size()


def read_counts(scaler: Any) -> dict[str, int]:
    """Return what a loss scaler counts, as numbers that only DeepSpeed has a use for.

    The good steps alone do not tell that the first doubling comes a step later than others."""
    return {key: int(getattr(scaler, key)) for key in _COUNTS if hasattr(scaler, key)}


def set_counts(scaler: Any, counts: Mapping[str, int]) -> None:
    """Take over what `read_counts` returned."""
    for key in _COUNTS:
        if key in counts and hasattr(scaler, key):
            setattr(scaler, key, counts[key])
