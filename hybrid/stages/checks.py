"""What can be said of a pipeline before it runs: of its stages, and of what passes between them.

`hybrid.stages.shapes` finds the boundaries. Every finding is one line that ends with its remedy.
Pure Python.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from importlib.metadata import version

from packaging.version import Version

from ..job.errors import Unsupported
from ..job.schema import Job, Pipeline
from ..layout import Layout, micro_batch_size, partition_by_weight
from .partition import partition

# Earlier ones scale gradients wrongly with more than one micro-batch: deepspeedai/DeepSpeed#7773,
# #8152; mended by #8154.
FIRST_RIGHT_DEEPSPEED = Version("0.19.3")


def check_stages(name: str, job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Raise Unsupported for a model that cannot be cut so, or a DeepSpeed that trains pipelines
    wrongly; returns warnings. `name`: pipeline or 2d."""
    check_release(version("deepspeed"))
    if summary.cut_problem:
        raise Unsupported(summary.cut_problem)
    settings = job.settings(name)
    assert isinstance(settings, Pipeline)
    sizes = summary.layer_parameters
    parts = partition(settings.partition, sizes, layout.pp)
    found = check_pipeline(name, job, layout, parts, sizes, summary.boundaries)
    if found.problems:
        raise Unsupported(found.problems[0])
    return found.warnings


def check_release(deepspeed: str) -> None:
    """Raise Unsupported for a DeepSpeed known to compute wrong pipeline gradients."""
    if Version(deepspeed) < FIRST_RIGHT_DEEPSPEED:
        raise Unsupported(
            f"deepspeed {deepspeed} trains pipelines on wrong gradients when it accumulates "
            f"(deepspeedai/DeepSpeed#8152); {FIRST_RIGHT_DEEPSPEED} or later is needed"
        )


ROWS = "rows"  # in a shape: the axis of the samples of a micro-batch
HEAVY = 1.5  # heaviest stage's parameters over their mean, from which on it is worth a warning
WASTE = 0.1  # share of a step's rows that may be padding without a warning


@dataclasses.dataclass(frozen=True)
class Boundary:
    """What a layer returns: what passes to the next stage where a stage ends there.

    `shapes` and `dtypes` have an entry a tensor; an axis that grows with the rows of a micro-batch
    is text, such as "rows" or "8*rows". `bytes_per_row` is what each row adds. `problem`: why this
    cannot pass between stages, with the mend; `unknown`: why it could not be found out.
    """

    after_layer: int
    shapes: tuple[tuple[int | str, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    bytes_per_row: int = 0
    problem: str | None = None
    unknown: str | None = None

    def describe(self) -> str:
        """Such as `float32 [rows, 8], bool [rows]`."""
        pairs = zip(self.dtypes, self.shapes, strict=True)
        return ", ".join(f"{dtype} [{', '.join(map(str, shape))}]" for dtype, shape in pairs)

    def fault(self) -> str | None:
        """Why this cannot pass between stages, as the end of "layer 3 returns ...", and the mend
        inside the layer."""
        if self.problem or self.unknown:
            return self.problem
        if all(dtype.startswith(("float", "bfloat")) for dtype in self.dtypes):
            return None
        # Measured on 0.19.8, three stages: with an int64 tensor in front of a floating one the loss
        # is infinite from the second step on; behind it all is well, as long as the order holds.
        return (
            f"{self.describe()}: only floating tensors may pass between stages, since DeepSpeed "
            "mixes up the buffers of others; make the others in each layer that needs them"
        )


@dataclasses.dataclass(frozen=True)
class Findings:
    """`problems` keep a pipeline from running, `warnings` do not."""

    problems: list[str]
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One pipeline as it would run."""

    name: str  # of the strategy: its section in the job
    job: Job
    layout: Layout
    parts: Sequence[range]
    sizes: Sequence[int]
    boundaries: Sequence[Boundary]

    @property
    def cuts(self) -> list[Boundary]:
        """The known boundaries that a stage other than the last ends with."""
        ends = [part.stop - 1 for part in self.parts[:-1]]
        return [b for b in self.boundaries if b.after_layer in ends]

    def fewer_stages(self, stages: int) -> str:
        """How a job asks for so many."""
        return f"parallel.pp = {stages}" if self.name == "2d" else f"--nproc {stages}"

    def other_cut(self) -> str:
        """The most even partition without faults, or why there is none."""
        barred = [b.after_layer for b in self.boundaries if b.fault()]
        groups = cut_groups(self.sizes, barred)
        cut = best_cut(self.sizes, len(self.parts), barred)
        if cut:
            return f"cut elsewhere: strategy.{self.name}.partition = {cut}"
        if len(groups) == 1:
            return "use a strategy without stages: no cut of these layers avoids it"
        return f"use {len(groups)} stages at most ({self.fewer_stages(len(groups))})"


def check_pipeline(
    name: str,
    job: Job,
    layout: Layout,
    parts: Sequence[range],
    layer_parameters: Sequence[int],
    boundaries: Sequence[Boundary],
) -> Findings:
    """Everything that can be found before processes start.

    name: the strategy's, `pipeline` or `2d`; parts: layers of each stage; layer_parameters:
    trainable parameters of each layer; boundaries: after each layer as far as known, none at all
    where the model is no plain chain.
    """
    plan = _Plan(name, job, layout, parts, layer_parameters, boundaries)
    problems, warnings = _stages(plan), [*_unknown(plan), *_padding(plan)]
    if not problems:
        problems = [*_crossings(plan), *_one_buffer(plan)]
        even = job.train.global_batch % (layout.dp * job.micro_batches(name)) == 0
        (warnings if even else problems).extend(_last_output(plan))
        warnings += _balance(plan)
    return Findings(problems, warnings)


def _stages(plan: _Plan) -> list[str]:
    """More stages than layers; stages without parameters."""
    layers, stages = len(plan.sizes), len(plan.parts)
    if stages > layers:
        plural = "layer" if layers == 1 else "layers"
        return [
            f"the model has {layers} {plural}, {stages} stages need as many or more: "
            f"{plan.fewer_stages(layers)}"
        ]
    return [
        f"stage {stage} (layers {part.start} to {part.stop - 1}) would have no parameters to "
        f"train; {plan.other_cut()}"
        for stage, part in enumerate(plan.parts)
        if not sum(plan.sizes[i] for i in part)
    ]


def _crossings(plan: _Plan) -> list[str]:
    """What cannot pass from stage to stage."""
    return [
        f"stage {stage} ends with layer {cut.after_layer}, which returns {fault}; or "
        f"{plan.other_cut()}"
        for stage, cut in enumerate(plan.cuts)
        if (fault := cut.fault())
    ]


def _one_buffer(plan: _Plan) -> list[str]:
    """A stage in the middle receives activations and gradients into the same buffers, made for the
    dtype that came first (DeepSpeed 0.19, `_allocate_or_extend_buffers`)."""
    cuts = [cut for cut in plan.cuts if cut.dtypes and not cut.fault()]
    for one, other in itertools.pairwise(cuts):
        for here, there in zip(one.dtypes, other.dtypes, strict=False):
            if here != there:
                return [
                    f"layer {one.after_layer} returns {one.describe()} and layer "
                    f"{other.after_layer} {other.describe()}: a stage between the two needs one "
                    "dtype in each place; have one of the layers convert what it returns"
                ]
    return []


def _last_output(plan: _Plan) -> list[str]:
    """The loss leaves padding out by rows, so the last layer must return one a sample."""
    last = plan.boundaries[-1] if plan.boundaries else None
    if last is None or last.after_layer != len(plan.sizes) - 1 or last.problem or last.unknown:
        return []
    if all(shape[:1] == (ROWS,) for shape in last.shapes):
        return []
    return [
        f"the last layer returns {last.describe()}: a micro-batch that is not full is padded, and "
        f"padding can be left out only along a first axis of {ROWS}; reshape in the loss instead"
    ]


def _unknown(plan: _Plan) -> list[str]:
    return [
        f"layer {b.after_layer} could not be tried on copies of a sample ({b.unknown}): what "
        "passes between stages from there on was not checked; see whether strategy single trains it"
        for b in plan.boundaries
        if b.unknown
    ]


def _padding(plan: _Plan) -> list[str]:
    """Micro-batches of a size that the global batch does not fill, or without any sample."""
    batch, dp = plan.job.train.global_batch, plan.layout.dp
    num = plan.job.micro_batches(plan.name)
    if not _wasteful(batch, dp, num):
        return []
    pieces, padded = dp * num, _rows_computed(batch, dp, num)
    mends = [f"train.global_batch a multiple of {pieces}"]
    fitting = [m for m in range(1, num) if not _wasteful(batch, dp, m)]
    if fitting:
        own = plan.job.settings(plan.name).micro_batches
        section = f"strategy.{plan.name}" if own else "train"
        mends.append(f"{section}.micro_batches = {fitting[-1]}")
    empty = f", {pieces - batch} of its {pieces} micro-batches have no sample"
    return [
        f"{padded - batch} of the {padded} rows that a step computes are padding"
        f"{empty if batch < pieces else ''}; make {' or '.join(mends)}"
    ]


def _rows_computed(batch: int, dp: int, num_micro_batches: int) -> int:
    return dp * num_micro_batches * micro_batch_size(batch, dp, num_micro_batches)


def _wasteful(batch: int, dp: int, num_micro_batches: int) -> bool:
    rows = _rows_computed(batch, dp, num_micro_batches)
    return rows - batch > WASTE * rows


def _balance(plan: _Plan) -> list[str]:
    """A stage much heavier than the mean."""
    heavy = _heaviness([sum(plan.sizes[i] for i in part) for part in plan.parts])
    if heavy < HEAVY:
        return []
    barred = [b.after_layer for b in plan.boundaries if b.fault()]
    cut = best_cut(plan.sizes, len(plan.parts), barred) or []
    starts = [sum(cut[:i]) for i in range(len(cut))]
    weights = [sum(plan.sizes[a : a + n]) for a, n in zip(starts, cut, strict=True)]
    words = f"the heaviest stage has {heavy:.1f} times the mean stage's parameters"
    if weights and _heaviness(weights) < 0.95 * heavy:
        better = f"strategy.{plan.name}.partition = {cut} makes it {_heaviness(weights):.1f}"
        return [f"{words}; {better}"]
    return [f"{words}, and no cut of these layers is more even; use fewer stages"]


def _heaviness(weights: Sequence[int]) -> float:
    return max(weights) * len(weights) / sum(weights)


def cut_groups(sizes: Sequence[int], barred: Collection[int]) -> list[int]:
    """Numbers of layers in the smallest runs that can be a stage: each has parameters, and none
    ends with a barred layer."""
    groups, length, weight = [], 0, 0
    for i, size in enumerate(sizes):
        length, weight = length + 1, weight + size
        if weight and i not in barred and sum(sizes[i + 1 :]):
            groups.append(length)
            length = weight = 0
    return [*groups, length]


def best_cut(sizes: Sequence[int], stages: int, barred: Collection[int]) -> list[int] | None:
    """Numbers of layers a stage so that the heaviest is as light as possible, cut between
    `cut_groups`; None where there are too few of these."""
    groups = cut_groups(sizes, barred)
    if len(groups) < stages:
        return None
    starts = [sum(groups[:i]) for i in range(len(groups))]
    weights = [sum(sizes[a : a + n]) for a, n in zip(starts, groups, strict=True)]
    return [sum(groups[i] for i in part) for part in partition_by_weight(weights, stages)]


@dataclasses.dataclass(frozen=True)
class ModelSummary:
    """A model before it is placed. `layer_parameters`: how many each layer trains; `cut_problem`:
    why it cannot be cut into stages; `boundaries`: what passes from layer to layer, as far as it is
    known."""

    layer_parameters: Sequence[int]
    cut_problem: str | None = None
    boundaries: Sequence[Boundary] = ()
