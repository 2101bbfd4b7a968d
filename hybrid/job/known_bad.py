"""This module knows the releases of DeepSpeed that train wrongly, and refuses to run them.

`benchmarks/known_failures.py` installs each of them and shows how a comparison catches it. The
module needs no torch."""

import dataclasses
from importlib.metadata import version

from packaging.version import Version

from .errors import Unsupported
from .schema import Job

FLAG = "--allow-known-bad"
FIRST_RIGHT_PIPELINE = Version("0.19.3")


@dataclasses.dataclass(frozen=True)
class KnownBad:
    """Describes one failure: the releases from `first` on and before `right` have it.

    `precisions` are those of `train.precision` that show it. `always`: it is refused without
    gradient accumulation too, which it takes to show."""

    strategies: tuple[str, ...]
    first: Version
    right: Version
    problem: str
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    always: bool = False


KNOWN_BAD = (
    KnownBad(
        ("pipeline", "2d"),
        Version("0"),
        FIRST_RIGHT_PIPELINE,
        "trains pipelines on wrong gradients when it accumulates (deepspeedai/DeepSpeed#8152)",
        always=True,
    ),
    KnownBad(
        ("zero2",),
        Version("0.17.6"),
        Version("0.18.3"),
        "loses gradients under ZeRO-2 when it accumulates (deepspeedai/DeepSpeed#7718)",
    ),
    KnownBad(
        ("zero1",),
        Version("0.18.6"),
        Version("0.19"),
        "sums wrong gradients under ZeRO-1 when it accumulates (deepspeedai/DeepSpeed#7985)",
        ("bf16", "fp16"),
    ),
)


def find_known_bad(job: Job, strategy: str, deepspeed: str) -> KnownBad | None:
    """Return the failure that a strategy would show under this release of DeepSpeed, or None."""
    release, accumulates = Version(deepspeed), job.micro_batches(strategy) > 1
    for bad in KNOWN_BAD:
        fits = strategy in bad.strategies and job.train.precision in bad.precisions
        if fits and bad.first <= release < bad.right and (accumulates or bad.always):
            return bad
    return None


def check_release(job: Job, strategy: str, deepspeed: str | None = None) -> list[str]:
    """Return a warning where the job allows a release of DeepSpeed that trains `strategy` wrongly.

    deepspeed: the release; left out, the installed one. Raises Unsupported where the job does not
    allow it by `launch.allow_known_bad`."""
    deepspeed = deepspeed or version("deepspeed")
    bad = find_known_bad(job, strategy, deepspeed)
    if bad is None:
        return []
    found = f"deepspeed {deepspeed} {bad.problem}"
    if job.launch.allow_known_bad:
        return [f"{found}; {FLAG} lets it run"]
    raise Unsupported(
        f"{found}; {bad.right} or later is needed ({FLAG} runs it all the same, to see it caught)"
    )
