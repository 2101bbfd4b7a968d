"""This module refuses parameters, and optimizers of a user's own, that an engine cannot take.

Every refusal comes before any process starts. The module needs no torch."""

from collections.abc import Sequence

from ..job.errors import Unsupported
from ..job.schema import Job
from ..stages.checks import ModelSummary

# What engines do with the tensors of an optimizer. `hybrid.engines.optimizer_trial` measures which
# of these a user's own one cannot bear.
CUTS = {
    "ranks": "runs on several ranks",
    "rows": "shards each tensor by rows",
    "flat": "steps pieces of one flat buffer of all tensors",
    "stages": "has a part of the tensors on each stage",
    "groups": "needs the same parameter groups on all stages",
}


def check_cuts(job: Job, strategy: str, summary: ModelSummary, cuts: Sequence[str]) -> None:
    """Raise Unsupported where the job's own optimizer cannot run over tensors cut so.

    cuts: what the strategy does, keys of `CUTS`."""
    for cut in cuts:
        if problem := summary.optimizer_problems.get(cut):
            name = job.optimizer.name
            raise Unsupported(f"optimizer.name = {name!r}: {strategy} {CUTS[cut]}; {problem}")


def check_parameters(
    summary: ModelSummary, scalars: str, empty: str | None = None, trained: bool = False
) -> None:
    """Raise Unsupported for a parameter without axes, or without elements, that an engine refuses.

    scalars, empty: what the engine does with such a parameter; None: it takes one. trained: it
    takes one without elements where that is not trained."""
    if summary.scalars:
        one = len(summary.scalars) == 1
        have, give = ("has", "it") if one else ("have", "them")
        raise Unsupported(
            f"{_list(summary.scalars)} {have} no axes (shape []): {scalars}; give {give} shape [1]"
        )
    found = [name for name, trains in summary.empty.items() if trains or not trained]
    if found and empty:
        have = "has" if len(found) == 1 else "have"
        raise Unsupported(f"{_list(found)} {have} no elements: {empty}")


def _list(names: Sequence[str]) -> str:
    few = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
    return f"{'parameter' if len(names) == 1 else 'parameters'} {few}"


DEEPSPEED_SCALARS = "DeepSpeed sends parameters to other ranks as bytes, and cannot view these so"
