"""The learning rate of each optimizer step: one pure function, the same under every strategy."""

from __future__ import annotations

import math

from ..job.schema import Job


def learning_rate(job: Job, step: int) -> float:
    """Rate of optimizer step `step`, from 0; `job.train.steps` must be known (`resolve_lengths`).

    Warm-up rises in equal parts to `optimizer.lr`; a linear or cosine schedule then falls towards
    `schedule.min_lr`, which every step after the last has (cosine: Loshchilov and Hutter 2017,
    without restarts).
    """
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
