"""Finds what would explain a difference between two runs; names a cause only if figures fit it."""

import dataclasses
import itertools
import math
from collections.abc import Mapping

from ..records import Record
from .differences import Found, relative

SAME_RATIO = 0.01  # relative; ratios nearer than this are the same number
SAME_UPDATE = 1e-3  # relative; first updates farther apart than this are different ones
SMALL_UPDATE = 1e-6  # relative to the tensor; what is smaller tells nothing of an update


@dataclasses.dataclass(frozen=True)
class Facts:
    """Holds what is known of a job, by which a cause is found.

    factors: the numbers by which a wrong scale would be off, by their names (micro-batches, ...).
    loss_tolerance: relative. clip_norm: at which gradients are clipped, 0: they are not. cut: how
    the micro-batches of the two runs differ, where the model has layers to which that matters."""

    factors: Mapping[str, int] = dataclasses.field(default_factory=dict)
    loss_tolerance: float = 1e-6
    clip_norm: float = 0.0
    cut: str | None = None


def likely_cause(run: Record, reference: Record, found: Found, facts: Facts) -> str | None:
    """Return what would explain a difference; None if nothing fits."""
    if where := _explain_resumption(run, found):
        return where
    known = {
        "initial weights": "other initial weights",
        "samples": "other samples in the batch",
        "sample_digest": "other samples in the batch",
        "lr": "another learning-rate schedule",
    }
    if found.quantity in known:
        return known[found.quantity]
    if not run.steps or not reference.steps:
        return None
    if facts.cut and _parts_by_cut(run, reference, facts):
        return facts.cut
    if found.quantity in ("loss", "grad_norm"):
        return (
            _explain_scale(run, reference, facts)
            or _explain_updates(run, reference, facts)
            or _explain_growth(run, reference, facts)
        )
    if found.quantity == "weights":
        return _explain_updates(run, reference, facts) or _explain_end(run, reference, facts)
    return None


def _explain_resumption(run: Record, found: Found) -> str | None:
    """Tell whether a run parts where it was resumed: at once, or after the first update there."""
    source = getattr(run, "resumed_from", None)  # records of a script may lack it
    if source is None or found.step not in (source.step, source.step + 1):
        return None
    return (
        f"it begins where the run was resumed, after step {source.step}: what was saved or loaded "
        "is not the whole state"
    )


def _parts_by_cut(run: Record, reference: Record, facts: Facts) -> bool:
    """Tell whether the first loss is off, which comes before any update, and by no scale."""
    mine, theirs = run.steps[0].loss, reference.steps[0].loss
    apart = relative(mine, theirs) > facts.loss_tolerance
    return apart and not (theirs and _explain_ratio(mine / theirs, facts.factors))


def _explain_scale(run: Record, reference: Record, facts: Facts) -> str | None:
    """Name a factor by which all gradients are off.

    The loss of the first step comes before any update: it must be right, or off by the same."""
    mine, theirs = run.steps[0], reference.steps[0]
    if not (mine.grad_norm and theirs.grad_norm and theirs.loss):
        return None
    scale = _explain_ratio(mine.grad_norm / theirs.grad_norm, facts.factors)
    if scale is None:
        return None
    if relative(mine.loss, theirs.loss) <= facts.loss_tolerance:
        return f"gradients {scale}"
    same = _explain_ratio(mine.loss / theirs.loss, facts.factors) == scale
    return f"loss and gradients {scale}" if same else None


def _explain_ratio(ratio: float, factors: Mapping[str, int]) -> str | None:
    """Describe a ratio that is one of the factors, their product or an inverse."""
    several = {name: value for name, value in factors.items() if value > 1}
    products = several | {" x ".join(several): math.prod(several.values())}
    for inverse in (False, True):
        names = [
            name
            for name, value in products.items()
            if value > 1 and abs(ratio * (value if inverse else 1 / value) - 1) < SAME_RATIO
        ]
        if names:
            way = "small: divided twice by" if inverse else "large: not divided by"
            size = 1 / ratio if inverse else ratio
            return f"{size:.3g} times too {way} the number of {' or of '.join(names)}"
    return None


def _explain_updates(run: Record, reference: Record, facts: Facts) -> str | None:
    """Describe which tensors' first updates differ from the reference's, and in which stage."""
    if still := _explain_still(run, reference):
        return still
    ratios = _update_ratios(run, reference)
    off = {name: r for name, r in ratios.items() if abs(r - 1) > SAME_UPDATE}
    if not off:
        return None
    low, high = min(off.values()), max(off.values())
    same = high - low < SAME_RATIO * abs(high)
    alike = f" {low:.4g} times the reference's" if same else " different"
    if len(off) == len(ratios):
        why = _explain_all_updates(low, reference, facts)
        return f"every first update is{alike}: {why}" if same else None
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
    count = f"{len(off)} tensors" if len(off) > 1 else "1 tensor"
    whose = "their" if len(off) > 1 else "its"
    return f"only {count} ({', '.join(few)}): {whose} first update is{alike}"


def _explain_all_updates(ratio: float, reference: Record, facts: Facts) -> str:
    """Say what makes every first update `ratio` times as large, while the gradient norms agree."""
    norm, clip = reference.steps[0].grad_norm or 0.0, facts.clip_norm
    clips = 0 < clip < norm
    if clips and ratio > 1:
        return f"clipped by a norm that is {1 / ratio:.3g} of the whole one, such as a part's"
    if not clips and ratio < 1 and abs(ratio * norm - 1) < SAME_RATIO:
        return "clipped at a norm of 1, as DeepSpeed does where its configuration does not say"
    return "another learning rate"


def _explain_still(run: Record, reference: Record) -> str | None:
    """Name the parameters whose first step moves them in one run and not at all in the other."""
    if run.weights is None or reference.weights is None:
        return None
    moved = [
        {n for n, after in w.after_first_step.items() if after != w.initial.get(n)}
        for w in (run.weights, reference.weights)
    ]
    for names, here, there in (
        (moved[0] - moved[1], "in the reference", "here"),
        (moved[1] - moved[0], "here", "in the reference"),
    ):
        if names:
            few = ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])])
            have = "has" if len(names) == 1 else "have"
            return (
                f"{few} {have} no first update {here}, and one {there}: such as a parameter that "
                "the loss does not use, and that weight decay moves in one of them"
            )
    return None


def _explain_growth(run: Record, reference: Record, facts: Facts) -> str | None:
    """Name gradients that add up over steps: the first one is right, and norms grow from then on.

    The loss of the second step comes before that shows. Its norm is at most the sum of two."""
    pairs = list(zip(run.steps[:4], reference.steps[:4], strict=False))
    if len(pairs) < 3 or any(not (a.grad_norm and b.grad_norm) for a, b in pairs):
        return None
    if any(relative(a.loss, b.loss) > facts.loss_tolerance for a, b in pairs[:2]):
        return None
    norms = [(a.grad_norm or 0.0, b.grad_norm or 0.0) for a, b in pairs]
    ratios = [a / b for a, b in norms]
    grows = all(later > sooner for sooner, later in itertools.pairwise(ratios))
    begins = abs(ratios[0] - 1) < SAME_RATIO < ratios[1] - 1
    if begins and grows and norms[1][0] <= norms[0][1] + norms[1][1]:
        return "gradients of earlier steps are still there: they are not zeroed"
    return None


def _explain_end(run: Record, reference: Record, facts: Facts) -> str | None:
    """Say what can be when all steps agree and the final weights do not."""
    if any(
        relative(a.loss, b.loss) > facts.loss_tolerance
        for a, b in zip(run.steps, reference.steps, strict=False)
    ):
        return None
    return "all steps agree: the last update is another one"


def _update_ratios(run: Record, reference: Record) -> dict[str, float]:
    """Return the first update of each tensor over the reference's, from their projections.
    Tensors whose update in the reference is tiny are left out."""
    if run.weights is None or reference.weights is None:
        return {}
    mine, theirs = run.weights, reference.weights
    ratios = {}
    for name, after in theirs.after_first_step.items():
        expected = after - theirs.initial[name]
        if name in mine.after_first_step and abs(expected) > SMALL_UPDATE * abs(after):
            ratios[name] = (mine.after_first_step[name] - mine.initial[name]) / expected
    return ratios
