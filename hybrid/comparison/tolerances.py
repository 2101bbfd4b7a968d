"""Defines how much two runs may differ and still be called equal, by their precision."""

# Relative, by `train.precision`. Weights: greatest |a-b| of a tensor over its greatest |b|.
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"loss": 1e-6, "grad_norm": 1e-4, "weights": 1e-5, "eval_loss": 1e-6, "correct": 0.0},
    "bf16": {"loss": 1e-3, "grad_norm": 2e-2, "weights": 0.25, "eval_loss": 1e-3, "correct": 0.02},
    "fp16": {"loss": 1e-3, "grad_norm": 2e-2, "weights": 0.25, "eval_loss": 1e-3, "correct": 0.02},
}
# In these first steps nothing excuses a difference: rounding cannot have grown past the tolerance
# yet, and a fault of scale, sample or schedule shows in the first one. bf16 and fp16 round 65,536
# and 8,192 times as much as fp32: a GPT of 10 million parameters, equal to 3e-5 for six steps,
# differs by more than 1e-2 in the gradient norm after ten (benchmarks/gpt.md).
EXACT_STEPS = {"fp32": 20, "bf16": 8, "fp16": 8}
# A communication hook rounds the gradients that it sends (bf16 keeps 8 bits, fp16 11) or sends a
# low-rank part of them, so such runs only approximate the reference. benchmarks/comm_hooks.md has
# the measurements.
HOOK_TOLERANCES: dict[str, dict[str, float]] = {
    "fp16": {"loss": 1e-3, "grad_norm": 1e-3, "weights": 1e-2, "eval_loss": 1e-3, "correct": 0.01},
    "bf16": {"loss": 5e-3, "grad_norm": 1e-2, "weights": 5e-2, "eval_loss": 5e-3, "correct": 0.01},
    "powersgd": {"loss": 2.0, "grad_norm": 5.0, "weights": 2.0, "eval_loss": 2.0, "correct": 0.2},
}


def tolerance(precision: str, hook: str = "none") -> dict[str, float]:
    """Return how much a run in this precision, with this communication hook, may differ."""
    wider = HOOK_TOLERANCES.get(hook, {})
    return {key: max(size, wider.get(key, 0.0)) for key, size in TOLERANCES[precision].items()}
