"""This module makes the result of an optimizer step of what all ranks say of it, if they agree."""

import math
from collections.abc import Sequence

from ..job.errors import RunError
from .counting import number
from .protocol import StepResult
from .step_queue import StartedStep, StepRow

RANKS_AGREE = 1e-6  # relative; all ranks get norms and rates by one all-reduce and equal arithmetic


def norms_of(
    step: StartedStep, rows: Sequence[StepRow], parts: Sequence[Sequence[int]]
) -> list[float]:
    """Return the gradients' global norm as each rank knows it.

    parts: the ranks whose squares add up to the whole, where a row has only a part."""
    norms = [row.norm for row in rows]
    if not step.norm_is_whole:
        for group in parts:
            whole = math.sqrt(sum(rows[rank].norm ** 2 for rank in group))
            for rank in group:
                norms[rank] = whole
    return norms


def step_result(step: StartedStep, rows: Sequence[StepRow], norms: Sequence[float]) -> StepResult:
    """Make the result of one step from every rank's row, and from the norm as each knows it.

    Under fp16, a norm that is not finite means that the step was skipped. Raises RunError if ranks
    disagree on norm or learning rate (a gradient was not reduced, a stage has another rate), or if
    the loss did not count the targets that it was divided by."""
    loss_sum = targets = 0.0
    samples, digests = 0, []
    for rank, row in enumerate(rows):
        if rank:
            _require_agreement("gradient norm", rank, norms[rank], norms[0])
            _require_agreement("learning rate", rank, row.lr, rows[0].lr)
        if not _same_count(row.targets, row.expected):
            raise RunError(
                f"rank {rank}: the loss counted {row.targets:.9g} targets where "
                f"{row.expected:.9g} were expected: what a loss counts must follow from the "
                "targets alone, and its count(target) must agree with it"
            )
        loss_sum, targets = loss_sum + row.loss_sum, targets + row.targets
        samples += int(row.samples)
        digests.append(row.digest if row.samples else None)
    return StepResult(
        loss=loss_sum / targets if targets else math.nan,
        grad_norm=norms[0] if step.has_norm else None,
        lr=rows[0].lr,
        samples=samples,
        sample_digest=f"{sum(filter(None, digests)) % 2**64:016x}",
        digest_by_rank=tuple(["" if one is None else f"{one:016x}" for one in digests]),
        targets=number(targets),
        loss_scale=step.loss_scale,
        skipped=bool(step.fault) or (step.loss_scale is not None and not math.isfinite(norms[0])),
        stop=int(max(row.stop for row in rows)),
        fault=step.fault,
    )


def _same_count(counted: float, expected: float) -> bool:
    """Tell whether two counts are one: exactly for whole numbers, but for rounding for weights."""
    if counted == expected or (float(counted).is_integer() and float(expected).is_integer()):
        return counted == expected
    return math.isclose(counted, expected, rel_tol=RANKS_AGREE)


def _require_agreement(what: str, rank: int, value: float, first: float) -> None:
    """Raise RunError if a rank, or a group of ranks, has another value than the first."""
    if value == first or math.isclose(value, first, rel_tol=RANKS_AGREE):
        return
    if math.isfinite(value) or math.isfinite(first):  # else the loop says what is wrong
        raise RunError(
            f"rank {rank} has {what} {value:.9g}, rank 0 has {first:.9g}: "
            "what all ranks share was not reduced over all of them"
        )
