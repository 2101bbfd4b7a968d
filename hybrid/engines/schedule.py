"""This module has the learning rate of each optimizer step, the same under every strategy."""

import math

from ..job.schema import Job


def learning_rate(job: Job, step: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Warm-up rises in equal parts to `optimizer.lr`. A linear or cosine schedule then falls towards
    `schedule.min_lr`, which every step after the last has (cosine: Loshchilov and Hutter 2017,
    without restarts). Raises ValueError if these need `job.train.steps` and it is not known yet
    (`resolve_lengths`)."""
    peak, warmup, low = job.optimizer.lr, job.schedule.warmup_steps, job.schedule.min_lr
    if step < warmup:
        return peak * (step + 1) / warmup
    if job.schedule.name == "constant":
        return peak
    if job.train.steps is None:
        raise ValueError("train.steps is not known yet; call resolve_lengths first")
    progress = min(1.0, (step - warmup) / max(1, job.train.steps - warmup))
    falling = 1 - progress
    if job.schedule.name == "cosine":
        falling = (1 + math.cos(math.pi * progress)) / 2
    return low + (peak - low) * falling
