"""This module checks a pipeline before it runs: its stages, and what passes between them.

`hybrid.stages.shapes` finds the boundaries. Every finding is one line that ends with its remedy.
The module is pure Python."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from ..job.errors import Unsupported
from ..job.known_bad import check_release
from ..job.schema import Job
from ..job.strategy_settings import Stages
from ..layout import Layout, make_ranges, micro_batch_size
from .partition import best_cut, cut_groups, partition, weigh

ROWS = "rows"  # in a shape: the axis of the samples of a micro-batch
HEAVY = 1.5  # least ratio of the heaviest stage's parameters to their mean that gives a warning
WASTE = 0.1  # share of a step's rows that may be padding without a warning


@dataclasses.dataclass(frozen=True)
class ModelSummary:
    """Summarises a model before it is placed.

    `layer_parameters`: how many parameters of each layer are trained; `cut_problem`: why it cannot
    be cut into stages; `boundaries`: what is known of what passes from layer to layer; `scalars`,
    names of the parameters without axes; `empty`: names of those without elements, each with
    whether it is trained; `optimizer_problems`: why a user's own optimizer cannot run over tensors
    that are cut, by how they are; `batch_norms`: the layers that mix the samples of a micro-batch,
    such as batch norms."""

    layer_parameters: Sequence[int]
    cut_problem: str | None = None
    boundaries: Sequence[Boundary] = ()
    scalars: Sequence[str] = ()
    empty: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    optimizer_problems: Mapping[str, str] = dataclasses.field(default_factory=dict)
    batch_norms: Sequence[str] = ()


def check_stages(name: str, job: Job, layout: Layout, summary: ModelSummary) -> list[str]:
    """Return warnings about the stages of strategy `name`, pipeline or 2d.

    Raises Unsupported for a model that cannot be cut so, or a DeepSpeed that trains pipelines
    wrongly and is to run them, and JobError for a partition that does not fit."""
    known_bad = [] if job.stages_by_torch(name) else check_release(job, name)
    if summary.cut_problem:
        raise Unsupported(summary.cut_problem)
    settings = job.settings(name)
    assert isinstance(settings, Stages)
    sizes = summary.layer_parameters
    parts = partition(settings.partition, sizes, layout.pp)
    found = check_pipeline(name, job, layout, parts, sizes, summary.boundaries)
    if found.problems:
        raise Unsupported(found.problems[0])
    return [*known_bad, *found.warnings]


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Describes what a layer returns, which passes to the next stage where a stage ends there.

    `shapes` and `dtypes` have an entry for each tensor; an axis that grows with the rows of a
    micro-batch is text, such as "rows" or "8*rows". `bytes_per_row` is what each row adds.
    `problem`: why this cannot pass between stages, and the remedy; `unknown`: why it could not be
    found out."""

    after_layer: int
    shapes: tuple[tuple[int | str, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    bytes_per_row: int = 0
    problem: str | None = None
    unknown: str | None = None

    def describe(self) -> str:
        """List dtypes and shapes, such as `float32 [rows, 8], bool [rows]`."""
        pairs = zip(self.dtypes, self.shapes, strict=True)
        return ", ".join(f"{dtype} [{', '.join(map(str, shape))}]" for dtype, shape in pairs)

    def fault(self, by_torch: bool = False) -> str | None:
        """Say why this cannot pass between stages, and the remedy in the layer, or return None.

        The text continues "layer 3 returns ...". by_torch: torch runs the stages."""
        if self.problem or self.unknown or by_torch:
            return self.problem
        if all(dtype.startswith(("float", "bfloat")) for dtype in self.dtypes):
            return None
        # Measured on DeepSpeed 0.19.8, three stages: with an int64 tensor before a floating one
        # the loss is infinite from the second step on; behind it the loss is right, as long as the
        # order stays the same.
        return (
            f"{self.describe()}: only floating tensors may pass between stages, since DeepSpeed "
            "mixes up the buffers of others; make the others in each layer that needs them"
        )


@dataclasses.dataclass(frozen=True)
class Findings:
    """Holds `problems`, which keep a pipeline from running, and `warnings`, which do not."""

    problems: list[str]
    warnings: list[str]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Describes one pipeline as it would run."""

    name: str  # of the strategy: its section in the job
    job: Job
    layout: Layout
    parts: Sequence[range]
    sizes: Sequence[int]
    boundaries: Sequence[Boundary]

    @property
    def by_torch(self) -> bool:
        """Tell whether torch runs the stages."""
        return self.job.stages_by_torch(self.name)

    @property
    def barred(self) -> list[int]:
        """Return the layers that no stage may end with."""
        return [b.after_layer for b in self.boundaries if b.fault(self.by_torch)]

    @property
    def cuts(self) -> list[Boundary]:
        """Return the known boundaries that a stage other than the last ends with."""
        ends = [part.stop - 1 for part in self.parts[:-1]]
        return [b for b in self.boundaries if b.after_layer in ends]

    def other_cut(self) -> str:
        """Name the most even partition without faults, or say why there is none."""
        groups = cut_groups(self.sizes, self.barred)
        if cut := best_cut(self.sizes, len(self.parts), self.barred):
            return f"cut elsewhere: strategy.{self.name}.partition = {cut}"
        if len(groups) == 1:
            return "use a strategy without stages: no cut of these layers avoids it"
        return f"use {len(groups)} stages at most ({_ask_for(self.name, len(groups))})"


def _ask_for(name: str, stages: int) -> str:
    return f"parallel.pp = {stages}" if name == "2d" else f"--nproc {stages}"


def too_many_stages(name: str, stages: int, layers: int) -> str | None:
    """Say that strategy `name` has more stages than the model has layers, None: it has not."""
    if stages <= layers:
        return None
    plural = "layer" if layers == 1 else "layers"
    said = f"the model has {layers} {plural}, {stages} stages need as many or more"
    return f"{said}: {_ask_for(name, layers)}"


def check_pipeline(
    name: str,
    job: Job,
    layout: Layout,
    parts: Sequence[range],
    layer_parameters: Sequence[int],
    boundaries: Sequence[Boundary],
) -> Findings:
    """Find everything that can be found before processes start.

    name: the strategy's, `pipeline` or `2d`; parts: layers of each stage; layer_parameters:
    trainable parameters of each layer; boundaries: those that are known, in order of the layers,
    and none at all where the model is no plain chain."""
    plan = _Plan(name, job, layout, parts, layer_parameters, boundaries)
    problems, warnings = _stages(plan), [*_unknown(plan), *_padding(plan)]
    if not problems:
        problems = [*_crossings(plan), *_one_buffer(plan)]
        even = job.train.global_batch % (layout.dp * job.micro_batches(name)) == 0
        (warnings if even else problems).extend(_last_output(plan))
        warnings += _balance(plan)
    return Findings(problems, warnings)


def _stages(plan: _Plan) -> list[str]:
    """Find more stages than layers, and stages without parameters."""
    if problem := too_many_stages(plan.name, len(plan.parts), len(plan.sizes)):
        return [problem]
    return [
        f"stage {stage} (layers {part.start} to {part.stop - 1}) would have no parameters to "
        f"train; {plan.other_cut()}"
        for stage, part in enumerate(plan.parts)
        if not sum(plan.sizes[i] for i in part)
    ]


def _crossings(plan: _Plan) -> list[str]:
    """Find what cannot pass from stage to stage."""
    return [
        f"stage {stage} ends with layer {cut.after_layer}, which returns {fault}; or "
        f"{plan.other_cut()}"
        for stage, cut in enumerate(plan.cuts)
        if (fault := cut.fault(plan.by_torch))
    ]


def _one_buffer(plan: _Plan) -> list[str]:
    """Find stages in the middle that receive activations and gradients of different dtypes.

    DeepSpeed 0.19 receives both into the same buffers, made for the dtype that came first
    (`_allocate_or_extend_buffers`)."""
    if plan.by_torch:
        return []
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
    """Find a last layer without a row for each sample, by which the loss leaves out padding."""
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
    """Find layers that could not be tried."""
    return [
        f"layer {b.after_layer} could not be tried on copies of a sample ({b.unknown}): what "
        "passes between stages from there on was not checked; see whether strategy single trains it"
        for b in plan.boundaries
        if b.unknown
    ]


def _padding(plan: _Plan) -> list[str]:
    """Find micro-batches that the global batch does not fill, or that have no sample at all."""
    batch, dp = plan.job.train.global_batch, plan.layout.dp
    num = plan.job.micro_batches(plan.name)
    if not _wasteful(batch, dp, num):
        return []
    pieces, padded = dp * num, _rows_computed(batch, dp, num)
    remedies = [f"train.global_batch a multiple of {pieces}"]
    fitting = [m for m in range(1, num) if not _wasteful(batch, dp, m)]
    if fitting:
        own = plan.job.settings(plan.name).micro_batches
        section = f"strategy.{plan.name}" if own else "train"
        remedies.append(f"{section}.micro_batches = {fitting[-1]}")
    empty = f", {pieces - batch} of its {pieces} micro-batches have no sample"
    return [
        f"{padded - batch} of the {padded} rows that a step computes are padding"
        f"{empty if batch < pieces else ''}; make {' or '.join(remedies)}"
    ]


def _rows_computed(batch: int, dp: int, num_micro_batches: int) -> int:
    return dp * num_micro_batches * micro_batch_size(batch, dp, num_micro_batches)


def _wasteful(batch: int, dp: int, num_micro_batches: int) -> bool:
    rows = _rows_computed(batch, dp, num_micro_batches)
    return rows - batch > WASTE * rows


def _balance(plan: _Plan) -> list[str]:
    """Find a stage much heavier than the mean, and a more even cut."""
    heavy = _heaviness(weigh(plan.sizes, plan.parts))
    if heavy < HEAVY:
        return []
    words = f"the heaviest stage has {heavy:.1f} times the mean stage's parameters"
    if cut := best_cut(plan.sizes, len(plan.parts), plan.barred):
        even = _heaviness(weigh(plan.sizes, make_ranges(cut)))
        if even < 0.95 * heavy:
            return [f"{words}; strategy.{plan.name}.partition = {cut} makes it {even:.1f}"]
    return [f"{words}, and no cut of these layers is more even; use fewer stages"]


def _heaviness(weights: Sequence[int]) -> float:
    """Divide the greatest weight by the mean."""
    return max(weights) * len(weights) / sum(weights)
