"""This module refuses parameters, optimizers of a user's own, and cuts of a batch into nothing.

Every refusal comes before any process starts. The module needs no torch."""

from collections.abc import Sequence

from ..job.errors import JobError, Unsupported
from ..job.schema import Job
from ..layout import Layout
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


def check_shares(
    job: Job, strategy: str, layout: Layout, num_samples: int | None = None
) -> list[str]:
    """Return a warning where some micro-batches of each batch have no sample.

    num_samples: of the train set, None where it is not known yet. Raises JobError where a rank, or
    one of its micro-batches, can have no sample in any step."""
    batch, ranks, pieces = job.train.global_batch, layout.dp, job.micro_batches(strategy)
    own = job.settings(strategy).micro_batches
    key = f"{f'strategy.{strategy}' if own else 'train'}.micro_batches"
    what = f"train.global_batch = {batch}"
    if num_samples and num_samples < batch:
        batch, what = num_samples, f"{what} of a train set of {num_samples} samples"
    if ranks > batch:
        raise JobError(
            f"{what}: {ranks - batch:,} of {ranks:,} data-parallel ranks ({strategy}) can have no "
            f"sample; valid: {batch:,} ranks at most, or {ranks:,} samples or more in a batch"
        )
    if pieces > batch:
        raise JobError(f"{key} = {pieces}: {what} is cut into more pieces; valid: 1 to {batch}")
    empty = ranks * pieces - batch
    if empty <= 0 or layout.pp > 1:  # of a pipeline, `hybrid.stages.checks` says it
        return []
    return [
        f"{key} = {pieces}: {empty} of the {ranks * pieces} micro-batches of a step have no "
        f"sample, since {what}; valid: {max(1, batch // ranks)} at most for {ranks} data-parallel "
        f"{'rank' if ranks == 1 else 'ranks'}"
    ]


def _list(names: Sequence[str]) -> str:
    few = ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
    return f"{'parameter' if len(names) == 1 else 'parameters'} {few}"


DEEPSPEED_SCALARS = "DeepSpeed sends parameters to other ranks as bytes, and cannot view these so"
