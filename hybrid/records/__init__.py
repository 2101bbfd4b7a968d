"""This module defines what a run leaves behind, and writes and reads it as JSON, without torch.

`Record` is one run (`record.json`), `Comparison` is one `hybrid compare` (`compare.json`). Every
relative difference is |a-b|/|b|; every size is in bytes, every time in seconds."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

from .verdicts import Best as Best
from .verdicts import Difference as Difference
from .verdicts import Parity as Parity
from .verdicts import ParityState as ParityState
from .verdicts import ReferenceFault as ReferenceFault
from .whole import write_whole

Kind = Literal["job", "unsupported", "room", "stopped", "error"]  # of a failure: whose fault it is
Status = Literal["running", "ok", "failed", "not_possible"]
PROXY = "proxy"  # `reference` of a run that a small job in its place was compared for
INTERRUPTED = "interrupted"  # `reason` of a run that was not made, or not to its end
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """Records one optimizer step, which is the same on every rank.

    `loss` is the sum over the global batch divided by its count, taken before the update;
    `grad_norm` is global and before clipping; `sample_digest` is the sum modulo 2**64 of a hash of
    each sample id, in hexadecimal; `targets` is the count. fp16 scales its loss by `loss_scale`,
    and where a gradient overflows the step is `skipped`: it has no norm and no update. So is a step
    that [guard] held back. `rolled_back_to`: the steps after which the state was then taken from a
    checkpoint, so that the updates since are lost too."""

    step: int
    loss: float
    grad_norm: float | None
    lr: float
    samples: int
    sample_digest: str
    targets: int | float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    rolled_back_to: int | None = None


@dataclasses.dataclass(frozen=True)
class Receipt:
    """Says what really ran, read off the live objects.

    `engaged` is False where the evidence contradicts the request, and `reason` says how."""

    engaged: bool
    evidence: dict[str, Any]
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Records one pass over the test set, with every sample once.

    `loss` is the sum over all `targets` divided by their number, or by their weights. `correct` and
    `accuracy` are None where the loss does not show predicted classes, `perplexity` (e to the mean
    cross-entropy) where these are not tokens. `prediction_digest` is additive over (sample id,
    predicted class). `metrics` are those of the job, by the names of their functions. With
    `train.eval_batches`, `samples` are the first ones of `set_samples` (None: all there are)."""

    loss: float
    samples: int
    correct: int | None = None
    accuracy: float | None = None
    prediction_digest: str | None = None
    perplexity: float | None = None
    targets: int | float | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    set_samples: int | None = None


@dataclasses.dataclass(frozen=True)
class StepEval:
    """Records an evaluation after `step` optimizer steps; 0 is before training."""

    step: int
    result: EvalResult


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Records the speed of the timed steps: those after warm-up in which no instrument ran.

    `samples_per_s` is the global batch divided by the median step; the mean is for strategies whose
    steps are not alike. A step lasts from the end of the one before: `loading_s_mean`, for which it
    waits for its batch on average, and the engine's own step, of median `engine_s_median`, are in
    it. With `data.workers` the median is of means over as many steps as load ahead.
    """

    samples_per_s: float
    step_s_median: float
    step_s_mean: float
    timed_steps: int
    tokens_per_s: float | None = None
    loading_s_mean: float = 0.0
    engine_s_median: float | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Records the peak of the live tensor storages of each rank; `how` names the instrument.

    `peak_bytes` counts from building the engine through the warm-up steps, `step_peak_bytes` in
    these steps alone."""

    peak_bytes: list[int]
    how: str
    step_peak_bytes: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Comm:
    """Records the bytes that each rank sent per step, averaged over `counted_steps` whole steps.

    `bytes_per_step` and `by_op` are counted calls times the ring algorithm's share of each payload;
    `tcp_bytes_per_step` is what the process's own sockets sent meanwhile (None where unknown).
    `not_counted` names operators of torch that were called and are in none of these counts."""

    bytes_per_step: list[float]
    by_op: dict[str, dict[str, list[float]]]
    counted_steps: int
    tcp_bytes_per_step: list[float] | None = None
    not_counted: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Records one number for each parameter, at the start and after the first step.

    The number is a fixed projection of the parameter in float64. It is linear, so that a ratio of
    updates shows what scaled them. For local SGD the first step is the first merge. `file` holds
    the final weights; its path is relative to the record."""

    initial: dict[str, float]
    after_first_step: dict[str, float]
    file: str | None = None


@dataclasses.dataclass(frozen=True)
class SavedState:
    """Names the newest checkpoint of a run: the steps done, and the hash of the whole state."""

    step: int
    state_hash: str


@dataclasses.dataclass(frozen=True)
class ResumedFrom:
    """Names the checkpoint that a run went on from; the hash is of the live state after loading."""

    path: str
    step: int
    state_hash: str


@dataclasses.dataclass(frozen=True)
class Record:
    """Records one run of one strategy: `record.json`.

    `strategy` is the name that was asked for; where that is a variant's, `variant_of` is the
    strategy whose variant it is. `warnings` are what the try-out found that this run can live with.
    Of a resumed run `steps` has those before it too, where their `steps.jsonl` is still there.
    `weights_from` says which weights `model.weights` named: `path`, `kind`, and what is known of
    them. `comparison` is the `id` of the comparison of which the run is one. `left_out` says how
    many entries a list lacks in its middle (`hybrid.records.steps`).
    """

    strategy: str
    status: Status
    reason: str | None = None
    world_size: int = 0
    layout: dict[str, int] = dataclasses.field(default_factory=dict)
    receipt: Receipt | None = None
    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    eval: EvalResult | None = None
    throughput: Throughput | None = None
    memory: Memory | None = None
    comm: Comm | None = None
    weights: Weights | None = None
    drift: list[dict[str, float]] | None = None
    evals: list[StepEval] = dataclasses.field(default_factory=list)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    variant_of: str | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    checkpoint: SavedState | None = None
    resumed_from: ResumedFrom | None = None
    weights_from: dict[str, Any] | None = None
    comparison: str | None = None
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Holds one job under several strategies: `compare.json`.

    `controls` are further records that the verdict used: the one-process emulation of `local_sgd`,
    `single` in other summing orders, and further runs of a reference that was in doubt. `id` says
    when it began, in UTC, and tells it from others; each of its records names it."""

    job: dict[str, Any]
    machine: dict[str, Any]
    reference: str
    strategies: dict[str, Record]
    parity: dict[str, Parity]
    ok: bool
    controls: dict[str, Record] = dataclasses.field(default_factory=dict)
    reference_fault: ReferenceFault | None = None
    best: Best = dataclasses.field(default_factory=Best)
    id: str | None = None


def to_dict(value: Any) -> dict[str, Any]:
    """Return the JSON object of a record."""
    return dataclasses.asdict(value)


def dumps(value: Any) -> str:
    """Return a record or a plain object as JSON, in which NaN and infinity stand as text.

    JSON has no numbers for them. `read` turns "nan", "inf" and "-inf" back into numbers."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    try:
        return json.dumps(plain, indent=1, allow_nan=False)
    except ValueError:
        return json.dumps(_with_text(plain), indent=1, allow_nan=False)


def _with_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_text(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_text(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write(value: Any, path: Path) -> None:
    """Write a record so that a reader sees the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, dumps(value) + "\n")


def read(kind: type[T], path: Path) -> T:
    """Read back what `write` wrote; raises ValueError where the file does not hold a `kind`."""
    return from_dict(kind, load(path))


def load(path: Path) -> Any:
    """Return what a JSON file holds; raises ValueError where it is none, or OSError.

    A pipe or a device, which one would read for ever, is none."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name}: is no regular file")
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name}: is nested too deeply") from None


def load_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; nothing where there is none, or one that cannot be read."""
    try:
        found = load(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_line(line: str | bytes) -> dict[str, Any]:
    """Read a line of `steps.jsonl`, in which a loss that is no number stands as text."""
    found: dict[str, Any] = json.loads(line)
    return found | {"loss": float(found["loss"])}


def from_dict(kind: type[T], data: Any) -> T:
    """Make a `kind` from its JSON object; raises pydantic's ValueError where a key is wrong."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).validate_python(data)
