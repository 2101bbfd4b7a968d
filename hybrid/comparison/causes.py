"""Finds what would explain a difference between two runs; names a cause only if figures fit it."""

import math
from collections.abc import Mapping

from ..records import Record
from .tolerances import EXACT_STEPS


def likely_cause(
    run: Record,
    reference: Record,
    quantity: str,
    factors: Mapping[str, int],
    exact_steps: int = EXACT_STEPS["fp32"],
) -> str | None:
    """Return what would explain a difference that begins in `quantity`; None if nothing fits."""
    if quantity.startswith("initial weights"):
        return "other initial weights"
    if quantity in ("samples", "sample_digest"):
        return "other samples in the batch"
    if quantity == "lr":
        return "another learning-rate schedule"
    if quantity.startswith("weights of ") and len(reference.steps) <= exact_steps:
        return (
            "all steps agree: either the last update, or rounding, which AdamW enlarges where a "
            f"gradient is near zero; a run of more than {exact_steps} steps measures which"
        )
    if quantity not in ("loss", "grad_norm") or not run.steps or not reference.steps:
        return None
    got, expected = run.steps[0].grad_norm, reference.steps[0].grad_norm
    scale = got and expected and _explain_ratio(got / expected, factors)
    if scale:
        return f"gradients {scale}"
    return _explain_updates(run, reference)


def _explain_ratio(ratio: float, factors: Mapping[str, int]) -> str | None:
    """Describe a ratio that is, within 1 %, one of the factors, their product or an inverse."""
    several = {name: value for name, value in factors.items() if value > 1}
    products = several | {" x ".join(several): math.prod(several.values())}
    for inverse in (False, True):
        names = [
            name
            for name, value in products.items()
            if value > 1 and abs(ratio * (value if inverse else 1 / value) - 1) < 0.01
        ]
        if names:
            way = "small: divided twice by" if inverse else "large: not divided by"
            size = 1 / ratio if inverse else ratio
            return f"{size:.3g} times too {way} the number of {' or of '.join(names)}"
    return None


def _explain_updates(run: Record, reference: Record) -> str | None:
    """Describe which tensors' first updates differ from the reference's, and in which stage."""
    ratios = _update_ratios(run, reference)
    off = {name: r for name, r in ratios.items() if abs(r - 1) > 1e-3}
    if not off:
        return None
    low, high = min(off.values()), max(off.values())
    alike = f" {low:.4g} times the reference's" if high - low < 0.01 * abs(high) else " different"
    if len(off) == len(ratios):
        return f"every first update is{alike}: another learning rate" if "times" in alike else None
    evidence = run.receipt.evidence if run.receipt else {}
    cut = zip(
        evidence.get("layers_by_stage", []), evidence.get("tensors_by_stage", []), strict=True
    )
    for stage, (layers, names) in enumerate(cut):
        if off.keys() <= set(names):
            return (
                f"one stage only: the first update of stage {stage} (layers {layers}) is{alike}, "
                "such as by another learning rate there"
            )
    few = [*sorted(off)[:3], *(["..."] if len(off) > 3 else [])]
    return f"only {len(off)} tensors ({', '.join(few)}): their first update is{alike}"


def _update_ratios(run: Record, reference: Record) -> dict[str, float]:
    """Return the first update of each tensor over the reference's, from their projections.
    Tensors whose update in the reference is tiny are left out."""
    if run.weights is None or reference.weights is None:
        return {}
    mine, theirs = run.weights, reference.weights
    ratios = {}
    for name, after in theirs.after_first_step.items():
        expected = after - theirs.initial[name]
        if name in mine.after_first_step and abs(expected) > 1e-6 * abs(after):
            ratios[name] = (mine.after_first_step[name] - mine.initial[name]) / expected
    return ratios
