"""Tests of what may be given as a loss or a metric, and of what is counted."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import hybrid
from hybrid.data.loader import MicroBatch
from hybrid.data.targets import targets_per_sample
from hybrid.engines.counting import TargetCounter, number, real_rows
from hybrid.engines.tally import Tally, eval_result
from hybrid.job.errors import JobError
from hybrid.models.loss_calls import LossCalls
from hybrid.models.losses import as_loss, take_loss
from hybrid.models.metrics import load_metrics, take_metric
from hybrid.models.own_loss import OwnLoss, model_input

from . import brought_losses
from .conftest import small_job

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(7)
ROWS, CLASSES, PLACES = 13, 5, 7
SCORES = torch.randn(ROWS, CLASSES, generator=DRAW)
NUMBERS = torch.randn(ROWS, CLASSES, generator=DRAW)
GRID = torch.randn(ROWS, CLASSES, PLACES, generator=DRAW)
LABELS = torch.randint(0, CLASSES, (ROWS,), generator=DRAW)
IGNORED = LABELS.masked_fill(torch.arange(ROWS) % 4 == 0, -100)
GRID_LABELS = torch.randint(0, CLASSES, (ROWS, PLACES), generator=DRAW)
CHANCES = SCORES.softmax(1)
BITS = (NUMBERS > 0).float()
WEIGHT = torch.tensor([0.3, 1.7, 0.9, 2.2, 0.4])
LISTS = torch.cat((LABELS[:, None], torch.full((ROWS, CLASSES - 1), -1)), 1)
LOGS = SCORES.log_softmax(1)
Case = tuple[Any, Any, torch.Tensor]
LOSSES: dict[str, Case] = {
    "classes": (nn.CrossEntropyLoss(), SCORES, IGNORED),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHT), SCORES, IGNORED),
    "ignored": (nn.CrossEntropyLoss(ignore_index=2), SCORES, LABELS),
    "smooth": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), SCORES, IGNORED),
    "axis 1": (nn.CrossEntropyLoss(weight=WEIGHT), GRID, GRID_LABELS),
    "chances": (nn.CrossEntropyLoss(weight=WEIGHT), SCORES, CHANCES),
    "chances on axis 1": (nn.CrossEntropyLoss(), GRID, GRID.softmax(1)),
    "nll": (nn.NLLLoss(weight=WEIGHT, ignore_index=1), LOGS, LABELS),
    "logits": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), SCORES, BITS),
    "bits": (nn.BCELoss(), SCORES.sigmoid(), BITS),
    "mse": (nn.MSELoss(reduction="mean"), SCORES, NUMBERS),
    "l1": (nn.L1Loss(), SCORES, NUMBERS),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), SCORES, NUMBERS),
    "huber": (nn.HuberLoss(delta=0.3), SCORES, NUMBERS),
    "poisson": (nn.PoissonNLLLoss(full=True), SCORES, NUMBERS.abs().round()),
    "gaussian": (nn.GaussianNLLLoss(full=True), (SCORES, SCORES.exp()), NUMBERS),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), LOGS, CHANCES),
    "kl": (nn.KLDivLoss(log_target=True), LOGS, CHANCES.log()),
    "margin": (nn.MultiMarginLoss(p=2, weight=WEIGHT), SCORES, LABELS),
    "margins": (nn.MultiLabelMarginLoss(), SCORES, LISTS),
    "labels": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), SCORES, BITS),
    "signs": (nn.SoftMarginLoss(), SCORES, 2 * BITS - 1),
    "hinge": (nn.HingeEmbeddingLoss(margin=0.5), SCORES, 2 * BITS - 1),
    "ranking": (nn.MarginRankingLoss(margin=0.1), (SCORES, NUMBERS), 2 * BITS - 1),
    "cosine": (nn.CosineEmbeddingLoss(margin=0.1), (SCORES, NUMBERS), 2 * BITS[:, 0] - 1),
    "function": (functional.cross_entropy, SCORES, IGNORED),
    "partial": (functools.partial(functional.cross_entropy, ignore_index=0), SCORES, LABELS),
    "a mean": (lambda a, b: functional.cross_entropy(a, b, weight=WEIGHT), SCORES, IGNORED),
}


def part(value: Any, start: int, stop: int) -> Any:
    return tuple(v[start:stop] for v in value) if isinstance(value, tuple) else value[start:stop]


@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", LOSSES)
def test_sums_over_unequal_pieces_make_torchs_mean(name: str) -> None:
    given, output, target = LOSSES[name]
    if name == "gaussian":
        expected = given(output[0], target, output[1])
    else:
        expected = given(*(output if isinstance(output, tuple) else (output,)), target)
    loss, counter = as_loss(given), TargetCounter(as_loss(given), CPU)
    counter.see(part(output, 0, 4), target[:4])
    total = count = 0.0
    for start, stop in ((0, 3), (3, 4), (4, ROWS)):
        some, aim = part(output, start, stop), target[start:stop]
        loss_sum, counted = take_loss(loss, some, aim)
        total, count = total + float(loss_sum), count + float(counted)
        ahead = counter.count(MicroBatch(None, aim, torch.arange(stop - start)))
        assert ahead == pytest.approx(float(counted), rel=1e-6)
    assert total / count == pytest.approx(float(expected), rel=1e-6)


class Focal(nn.Module):
    """Returns a mean that is none of torch's."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (1 - functional.cross_entropy(output, target, reduction="none")).mean()


class Learned(nn.Module):
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (nn.MSELoss(reduction="none"), "reduction = 'none'; valid: mean, sum"),
        (nn.CTCLoss(), "torch's CTCLoss: its mean cannot be taken"),
        (functional.ctc_loss, "torch's ctc_loss: its mean cannot be taken"),
        (functools.partial(functional.mse_loss, weight=WEIGHT), "weight: valid keywords: none"),
        (functools.partial(functional.mse_loss, size_average=False), "size_average: valid"),
        (nn.CrossEntropyLoss, "the loss is the class CrossEntropyLoss"),
        (3, "the loss is a int, not a function"),
        (Learned(), r"parameters of its own \(spread\).*put them into a layer"),
    ],
)
def test_losses_that_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        as_loss(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Focal(), r"returned one tensor of shape \[\]; it must return \(sum, count\)"),
        (lambda a, b: 2 * functional.cross_entropy(a, b), r"one tensor of shape \[\]"),
        (lambda a, b: None, "the loss returned None"),
        (lambda a, b: (a.sum(1), 13), r"shape \[13\] as its sum"),
        (lambda a, b: (a.sum(), "many"), "a str as its count"),
        (nn.MSELoss(), "torch would broadcast"),
        (nn.CrossEntropyLoss(), None),
    ],
)
def test_losses_that_return_something_else(given: Any, words: str | None) -> None:
    loss = as_loss(given)
    if words is None:
        with pytest.raises(JobError, match=r"classes on axis 1.*hybrid.cross_entropy"):
            loss(torch.zeros(2, 3, CLASSES), torch.zeros(2, 3, dtype=torch.int64))
    else:
        with pytest.raises(JobError, match=words):
            take_loss(loss, SCORES, LABELS)


def test_the_data_tell_the_count_only_of_what_the_loss_leaves_out() -> None:
    samples = torch.utils.data.TensorDataset(SCORES, LABELS)
    told = {name: targets_per_sample(samples, as_loss(LOSSES[name][0])) for name in LOSSES}
    assert told["classes"] == 1 and told["weights"] is None and told["mse"] is None
    assert told["ignored"] is None, "the set has targets that this loss leaves out"
    other = torch.utils.data.TensorDataset(SCORES, LABELS.clamp(min=3))
    assert targets_per_sample(other, as_loss(LOSSES["ignored"][0])) == 1
    assert targets_per_sample(samples, lambda output, target: (output.sum(), 1)) is None


def scored(given: Any, output: Any, target: Any, pieces: int = 1) -> Any:
    loss, tally = as_loss(given), Tally(CPU)
    rows = torch.arange(len(output)).tensor_split(pieces)
    for ids in rows:
        tally.add(loss, output[ids], MicroBatch(None, target[ids], ids), score=True)
    return eval_result(tally)


def test_accuracy_is_read_off_the_losss_own_call() -> None:
    right = float((GRID.argmax(1) == GRID_LABELS).float().mean())
    by_grid = scored(*LOSSES["axis 1"])
    assert by_grid.accuracy == pytest.approx(right)
    entropy = float(functional.cross_entropy(GRID, GRID_LABELS))
    assert by_grid.perplexity == pytest.approx(torch.tensor(entropy).exp().item(), rel=1e-6)
    weighted, kept = scored(*LOSSES["weights"]), IGNORED != -100
    hits = int((SCORES.argmax(1) == IGNORED)[kept].sum())
    assert (weighted.correct, weighted.accuracy) == (hits, hits / int(kept.sum()))
    assert weighted.perplexity is None and not isinstance(weighted.targets, int)
    logit, bit = SCORES[:, :1], (NUMBERS[:, :1] > 0).float()
    one = scored(nn.BCEWithLogitsLoss(), logit, bit)
    assert one.accuracy == pytest.approx(float(((logit > 0) == (bit > 0)).float().mean()))
    assert scored(*LOSSES["a mean"]).correct == hits, "the same call, seen through a mean"
    assert scored(*LOSSES["a mean"], pieces=5) == scored(*LOSSES["weights"], pieces=5)


@pytest.mark.parametrize("name", ["mse", "logits", "chances", "hinge"])
def test_no_accuracy_where_there_are_no_classes(name: str) -> None:
    result = scored(*LOSSES[name])
    assert (result.correct, result.accuracy, result.perplexity) == (None, None, None)

    def counts(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
        return (output - target[:, None]).abs().sum(), len(target)

    assert scored(counts, SCORES, LABELS).accuracy is None, "guessed from shapes"


def test_rows_are_cut_in_any_nesting() -> None:
    value = {"a": (SCORES, None), "b": [LABELS]}
    cut = real_rows(value, 4, ROWS)
    assert cut["a"][0].shape == (4, CLASSES) and cut["b"][0].shape == (4,)
    assert isinstance(number(torch.tensor(3.0)), int) and number(torch.tensor(2.5)) == 2.5


@pytest.mark.parametrize(("kind", "counted"), [("all", 15), ("next", 16)])
def test_the_count_of_a_modules_own_loss_is_what_it_takes_the_mean_over(
    kind: str, counted: int
) -> None:
    module = brought_losses.own(kind)[0][0]
    tokens = torch.arange(18).reshape(2, 9)
    target = tokens + 1 if kind == "next" else (tokens + 1).masked_fill(tokens % 6 == 0, -1)
    loss = OwnLoss()
    with LossCalls() as watched:
        output = module(model_input(loss, tokens, target))
    with pytest.raises(JobError, match="not known what"):
        loss(output, target)
    loss.learn(watched.calls, output, target)
    total, count = take_loss(loss, output, target)
    assert count == counted and loss.count is not None
    mean = output["loss"] if kind == "next" else output[1]
    assert total.item() == pytest.approx(counted * mean.item())
    assert model_input(loss, {"x": 1}, 2) == {"x": 1, "labels": 2}


def test_a_modules_own_loss_that_adds_something_is_refused() -> None:
    module, target = brought_losses.own("more")[0][0], torch.arange(9).reshape(1, 9)
    loss = OwnLoss()
    with LossCalls() as watched:
        output = module(model_input(loss, target, target))
    with pytest.raises(JobError, match="adds something"):
        loss.learn(watched.calls, output, target)


METRIC = "tests.brought_losses:"


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["far"], "train.metrics = 'far': unknown; valid: package.module:function"),
        (["tests.brought_losses:fat"], "has no attribute 'fat'"),
        (["tests.nowhere:far"], "train.metrics = 'tests.nowhere:far': cannot be imported"),
        (["tests.brought_losses:VOCABULARY"], "is not a function"),
        ([METRIC + "far", METRIC + "far"], "another metric is called 'far' too"),
    ],
)
def test_metrics_that_are_refused(metrics: list[str], words: str) -> None:
    with pytest.raises(JobError, match=words):
        load_metrics(small_job(train__metrics=metrics))
    with pytest.raises(JobError, match="single_number returned Tensor; it must return"):
        take_metric("single_number", brought_losses.single_number, SCORES, LABELS)


def test_several_losses_with_weights_are_exact_under_every_strategy(tmp_path: Path) -> None:
    """Batches of 7 in 25 samples on 4 ranks: micro-batches are empty, and the last has 4."""
    job = small_job(
        model={"name": "tests.brought_losses:several"},
        data={"name": "tests.brought_losses:rows"},
        train={"global_batch": 7, "micro_batches": 2, "steps": 5, "metrics": [METRIC + "far"]},
        launch={"collective_timeout_s": 40},
    )
    names = ["ddp", "fsdp", "zero3", "2d"]
    result = hybrid.compare(job, names, nproc=4, out=tmp_path)
    expected = result.strategies["single"]
    assert result.ok and expected.eval is not None
    assert any(isinstance(step.targets, float) for step in expected.steps)
    for name in names:
        record = result.strategies[name]
        assert record.status == "ok" and record.eval is not None
        assert record.eval.metrics == pytest.approx(expected.eval.metrics, rel=1e-6)
        counts = [step.targets for step in record.steps]
        assert counts == pytest.approx([step.targets for step in expected.steps], rel=1e-6)
    assert expected.eval.correct is not None and "far" in (tmp_path / "compare.md").read_text()
