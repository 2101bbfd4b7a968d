"""What is found of a pipeline before its processes start, and that each finding names its mend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from hybrid.job.schema import Job
from hybrid.layout import Layout
from hybrid.models.layers import Layers
from hybrid.stages.checks import Boundary, Findings, best_cut, check_pipeline
from hybrid.stages.partition import partition
from hybrid.stages.shapes import boundaries
from tests.conftest import small_job

WIDTH = 8
ROW = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([1, 2, 0, 3])


class Returns(nn.Module):
    """A layer of 72 parameters that returns whatever `what` makes of its output."""

    def __init__(self, what: Callable[[torch.Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(WIDTH, WIDTH), what

    def forward(self, x: Any) -> Any:
        """The first tensor in `x` is taken."""
        while not isinstance(x, torch.Tensor):
            x = x["x"] if isinstance(x, dict) else x[0]
        return self.what(self.linear(x))


class Takes(nn.Module):
    """A layer that takes what any `Returns` returned, and returns [rows, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Any) -> Any:
        """Put the rows first."""
        x = x["x"] if isinstance(x, dict) else x if isinstance(x, torch.Tensor) else x[0]
        return (x.t() if x.shape[0] == WIDTH else x) * self.scale


def find(layers: Sequence[nn.Module], sample: Any = ROW) -> list[Boundary]:
    return boundaries(Layers(layers), [(sample, 0)])


def check(
    layers: Sequence[nn.Module],
    sample: Any = ROW,
    stages: int = 2,
    cut: Any = "uniform",
    name: str = "pipeline",
    dp: int = 1,
    **changes: Any,
) -> Findings:
    """What is found of a model in `stages` stages; `changes` as for `small_job`."""
    job: Job = small_job(**changes)
    sizes = Layers(layers).sizes()
    parts = partition(cut, sizes, stages)
    layout = Layout(pp=stages, dp=dp, replicate=dp)
    return check_pipeline(name, job, layout, parts, sizes, find(layers, sample))


def only(lines: list[str]) -> str:
    (line,) = lines
    assert "\n" not in line
    return line


def test_a_layer_that_fails_is_unknown_and_no_error() -> None:
    layers = [Returns(), Returns(), nn.Linear(9, 2), Returns()]
    found = find(layers)
    assert len(found) == 3 and "shapes cannot be multiplied" in str(found[2].unknown)
    result = check(layers, stages=2)
    assert result.problems == []
    assert result.warnings[0].startswith("layer 2 could not be tried on copies of a sample (mat1")


def test_a_model_that_joins_its_layers_itself_is_left_alone() -> None:
    class Joined(Layers):
        def join(self, part: range) -> nn.Module:
            raise AssertionError("not to be called")

    assert boundaries(Joined([Returns()]), [(ROW, 0)]) == []
    sizes = [72, 72]
    job, layout = small_job(), Layout(pp=2)
    assert check_pipeline("pipeline", job, layout, [range(1), range(1, 2)], sizes, ()) == (
        Findings([], [])
    )


def test_a_sound_model_has_no_findings() -> None:
    layers: list[nn.Module] = [Returns(lambda x: (x, x * 2)), Returns(), Returns(), Returns()]
    assert check(layers, stages=2) == check(layers, stages=4) == Findings([], [])


def test_integers_between_stages() -> None:
    layers: list[nn.Module] = [Returns(), Returns(lambda x: (x, x.long())), Returns(), Returns()]
    assert only(check(layers).problems) == (
        "stage 0 ends with layer 1, which returns float32 [rows, 8], int64 [rows, 8]: only "
        "floating tensors may pass between stages, since DeepSpeed mixes up the buffers of "
        "others; make the others in each layer that needs them; or cut elsewhere: "
        "strategy.pipeline.partition = [1, 3]"
    )
    assert check(layers, cut=[1, 3]).problems == [], "the mend works"
    assert check(layers, cut=[3, 1]).problems == [], "inside a stage they do no harm"


def test_what_the_last_layer_returns_goes_to_no_stage() -> None:
    for what in (lambda x: {"x": x}, lambda x: (x, x > 0), lambda x: x.t()):
        assert check([Returns(), Returns(), Returns(what)]).problems == []


def test_a_mask_between_stages_and_no_cut_without_it() -> None:
    masked = [Returns(lambda x: (x, x > 0)) for _ in range(3)]
    line = only(check([*masked, Returns()]).problems)
    assert "which returns float32 [rows, 8], bool [rows, 8]: only floating" in line
    assert line.endswith("use a strategy without stages: no cut of these layers avoids it")
    line = check([*masked[:1], Returns(), *masked[1:], Returns()], stages=3).problems[0]
    assert line.endswith("use 2 stages at most (--nproc 2)")
    line = check([*masked[:1], Returns(), *masked[1:], Returns()], stages=3, name="2d").problems[0]
    assert line.endswith("use 2 stages at most (parallel.pp = 2)")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda x: {"x": x}, "a dict: return a tensor or a tuple of floating tensors"),
        (lambda x: [x, x], "a list: return a tensor or a tuple"),
        (lambda x: (x, None), "a tuple with a NoneType in it: return a tensor or a tuple"),
        (lambda x: (x, torch.ones(3)), "a float32 tensor through which no gradient flows: make"),
    ],
    ids=["dict", "list", "None", "no gradient"],
)
def test_what_cannot_be_sent(what: Callable[[torch.Tensor], Any], said: str) -> None:
    line = only(check([Returns(), Returns(what), Takes(), Returns()], name="2d").problems)
    assert line.startswith(f"stage 0 ends with layer 1, which returns {said}")
    assert line.endswith("; or cut elsewhere: strategy.2d.partition = [1, 3]")


def test_one_place_has_one_dtype_where_a_stage_lies_between() -> None:
    layers: list[nn.Module] = [Returns(), Returns(lambda x: x.double()), Returns()]
    layers[2].double()
    line = only(check(layers, stages=3).problems)
    assert "layer 0 returns float32 [rows, 8] and layer 1 float64 [rows, 8]" in line
    assert line.endswith("have one of the layers convert what it returns")
    assert check(layers, stages=2).problems == []


def test_an_empty_stage() -> None:
    layers = [Returns(), Returns(), nn.Tanh(), Returns(), nn.Tanh()]
    line = only(check(layers, stages=3, cut=[2, 1, 2]).problems)
    assert line == (
        "stage 1 (layers 2 to 2) would have no parameters to train; cut elsewhere: "
        "strategy.pipeline.partition = [1, 1, 3]"
    )
    assert check(layers, stages=3, cut=[1, 1, 3]).problems == []


def test_more_stages_than_layers() -> None:
    for name, mend in (("pipeline", "--nproc 2"), ("2d", "parallel.pp = 2")):
        line = only(check([Returns(), Returns()], stages=3, name=name).problems)
        assert line == f"the model has 2 layers, 3 stages need as many or more: {mend}"
    assert "has 1 layer, 2 stages" in only(check([Returns()]).problems)


def test_an_unbalanced_cut() -> None:
    layers = [nn.Linear(8, 512), nn.Linear(512, 8), Returns(), Returns(), Returns(), Returns()]
    line = only(check(layers, stages=3).warnings)
    assert line == (
        "the heaviest stage has 2.9 times the mean stage's parameters; "
        "strategy.pipeline.partition = [1, 1, 4] makes it 1.5"
    )
    assert check(layers, stages=3).problems == []
    line = only(check(layers, stages=3, cut=[1, 1, 4]).warnings)
    assert line == (
        "the heaviest stage has 1.5 times the mean stage's parameters, and no cut of these layers "
        "is more even; use fewer stages"
    )


def test_the_mend_of_an_unbalanced_cut_keeps_off_what_cannot_pass() -> None:
    def layers() -> list[nn.Module]:
        return [Returns() for _ in range(6)]

    assert only(check(layers(), cut=[5, 1]).warnings).endswith("partition = [3, 3] makes it 1.0")
    masked = layers()
    masked[2] = Returns(lambda x: (x, x > 0))
    assert only(check(masked, cut=[5, 1]).warnings).endswith("partition = [2, 4] makes it 1.3")


@pytest.mark.parametrize(
    ("batch", "micro_batches", "dp", "said"),
    [
        (3, 4, 1, "1 of the 4 rows that a step computes are padding, 1 of its 4 micro-batches have "
                  "no sample; make train.global_batch a multiple of 4 or train.micro_batches = 3"),
        (2, 4, 3, "10 of the 12 rows that a step computes are padding, 10 of its 12 micro-batches "
                  "have no sample; make train.global_batch a multiple of 12"),
        (9, 4, 2, "7 of the 16 rows that a step computes are padding; make train.global_batch a "
                  "multiple of 8 or train.micro_batches = 1"),
        (100, 4, 3, None),
        (24, 4, 3, None),
    ],
)  # fmt: skip
def test_micro_batches_that_the_batch_does_not_fill(
    batch: int, micro_batches: int, dp: int, said: str | None
) -> None:
    train = {"train__global_batch": batch, "train__micro_batches": micro_batches}
    result = check([Returns(), Returns()], name="2d", dp=dp, **train)
    assert result == Findings([], [said] if said else [])


def test_the_mend_of_micro_batches_names_the_section_that_sets_them() -> None:
    changes = {"train__global_batch": 3, "strategy__2d__micro_batches": 4}
    line = only(check([Returns(), Returns()], name="2d", **changes).warnings)
    assert line.endswith("or strategy.2d.micro_batches = 3")


def test_an_output_whose_padding_cannot_be_left_out() -> None:
    layers = [nn.Embedding(5, WIDTH), Returns(lambda x: x.flatten(0, 1))]
    line = only(check(layers, TOKENS, train__global_batch=23).problems)
    assert line.startswith("the last layer returns float32 [4*rows, 8]: a micro-batch that is not")
    assert line.endswith("reshape in the loss instead")
    whole = check(layers, TOKENS)
    assert whole == Findings([], [line]), "a batch that divides runs, until the data's tail"
    inside = [nn.Embedding(5, WIDTH), Returns(lambda x: x.flatten(0, 1))]
    inside += [Returns(lambda x: x.unflatten(0, (-1, 4)))]
    assert check(inside, TOKENS, train__global_batch=23).problems == []


@pytest.mark.parametrize(
    ("sizes", "stages", "barred", "cut"),
    [
        ([1, 1, 1, 1], 2, [], [2, 2]),
        ([1, 1, 1, 1], 2, [1], [1, 3]),
        ([0, 5, 0, 5, 0], 2, [], [2, 3]),
        ([0, 5, 0, 5, 0], 2, [1], [3, 2]),
        ([0, 5, 0, 5, 0], 3, [], None),
        ([9, 1, 1, 1], 3, [0], [2, 1, 1]),
        ([9, 1, 1, 1], 4, [0], None),
        ([3], 1, [], [1]),
    ],
)
def test_the_best_cut(
    sizes: list[int], stages: int, barred: list[int], cut: list[int] | None
) -> None:
    assert best_cut(sizes, stages, barred) == cut
