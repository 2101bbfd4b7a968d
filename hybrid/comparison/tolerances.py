"""Defines how much two runs may differ and still be called equal, by their precision."""

from collections.abc import Sequence

from ..job.schema import Job
from ..records import StepRecord

# Relative, by `train.precision`. Weights: greatest |a-b| of a tensor over its greatest |b|.
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"loss": 1e-6, "grad_norm": 1e-4, "weights": 1e-5, "eval_loss": 1e-6, "correct": 0.0},
    "bf16": {"loss": 1e-3, "grad_norm": 2e-2, "weights": 1e-3, "eval_loss": 1e-3, "correct": 0.02},
    "fp16": {"loss": 1e-3, "grad_norm": 2e-2, "weights": 1e-3, "eval_loss": 1e-3, "correct": 0.02},
}
# In these first steps nothing excuses a difference: rounding cannot have grown past the tolerance
# yet, and a fault of scale, sample or schedule shows in the first one. bf16 and fp16 round 65,536
# and 8,192 times as much as fp32. Measured on 170 small jobs in bf16, the same sums in other orders
# move the loss by at most 1.5e-7 in the first step and 4.2e-4 in the second, at rates up to 30
# times what trains well; after that, at such rates, by up to 1.4e-2.
EXACT_STEPS = {"fp32": 20, "bf16": 2, "fp16": 2}
# A communication hook rounds the gradients that it sends (bf16 keeps 8 bits, fp16 11) or sends a
# low-rank part of them, so such runs only approximate the reference. benchmarks/comm_hooks.md has
# the measurements.
HOOK_TOLERANCES: dict[str, dict[str, float]] = {
    "fp16": {"loss": 1e-3, "grad_norm": 1e-3, "weights": 1e-2, "eval_loss": 1e-3, "correct": 0.01},
    "bf16": {"loss": 5e-3, "grad_norm": 1e-2, "weights": 5e-2, "eval_loss": 5e-3, "correct": 0.01},
    "powersgd": {"loss": 2.0, "grad_norm": 5.0, "weights": 2.0, "eval_loss": 2.0, "correct": 0.2},
}


def hook_of(job: Job, strategy: str) -> str:
    """Return the communication hook that a strategy has in a job; only DDP takes one."""
    return job.strategy.ddp.comm_hook if strategy == "ddp" else "none"


def tolerance(precision: str, hook: str = "none") -> dict[str, float]:
    """Return how much a run in this precision, with this communication hook, may differ."""
    wider = HOOK_TOLERANCES.get(hook, {})
    return {key: max(size, wider.get(key, 0.0)) for key, size in TOLERANCES[precision].items()}


# A difference in a tensor is relative to its greatest magnitude, and that to at least this part of
# what the optimizer moved: 1e-5 of it is then one fp32 rounding of a whole update. A gradient that
# is zero but for rounding, such as that of an attention's key bias, moves its tensor by less.
SHARE_OF_MOVEMENT = 1e-2


def rounding_floor(job: Job, steps: Sequence[StepRecord]) -> float:
    """Return the magnitude below which all that a tensor holds may be rounding.

    steps: of the reference. SGD moves the weights by rate times gradient, which momentum sums up;
    Adam moves each weight by about its rate."""
    clip, rates = job.train.clip_norm or float("inf"), [step.lr for step in steps]
    if job.optimizer.name != "sgd":
        return SHARE_OF_MOVEMENT * sum(rates)
    norms = [min(step.grad_norm or 0.0, clip) for step in steps]
    moved = sum(rate * norm for rate, norm in zip(rates, norms, strict=True))
    return SHARE_OF_MOVEMENT * moved / (1 - job.optimizer.momentum)
