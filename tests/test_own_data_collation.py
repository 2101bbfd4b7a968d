"""Samples of a user's own that a function of the user's own collates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid.data.batches import BatchPlan
from hybrid.data.check import collate_warnings
from hybrid.data.collation import find_longest
from hybrid.data.loader import MicroBatch, load_micro_batch
from hybrid.data.samples import job_sets
from hybrid.data.steps import StepLoader
from hybrid.job.errors import JobError, RunError
from hybrid.models.losses import cross_entropy
from tests import own_data
from tests.own_data import Own, augmented, pad, sentence
from tests.own_samples import NAME, X, judge, sets


def sentence_sets() -> tuple[Any, Any]:
    return job_sets(NAME, 5, *own_data.sentences())


def loss_of(batches: list[MicroBatch]) -> tuple[float, int]:
    """The loss of the word model, over the samples that are no padding."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*own_data.word_model()[0])
    sums = [cross_entropy(model(b.input)[: len(b.ids)], b.target[: len(b.ids)]) for b in batches]
    return sum(s.item() for s, _ in sums), int(sum(n for _, n in sums))


def test_a_collate_function_pads_each_micro_batch() -> None:
    train, _ = sentence_sets()
    assert train.collate is pad
    for ids in ([3, 1, 7], [2], []):
        batch = load_micro_batch(train, ids)
        expected = pad([sentence(i) for i in ids or [0]])
        assert torch.equal(batch.input, expected[0]) and torch.equal(batch.target, expected[1])
        assert load_micro_batch(train, ids, targets=False).target is None
    losses = [
        loss_of([b for s in range(6) for b in StepLoader(plan, train, range(plan.shares)).step(s)])
        for plan in (BatchPlan(50, 11, 1, 1, 3), BatchPlan(50, 11, 4, 3, 3))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_fixed_shapes_are_those_of_the_jobs_longest_sample() -> None:
    """The longest is sample 3 of the test set, whose padding the loss does not see."""
    train, test = sentence_sets()
    longest = len(sentence(3)) + 6 - 1
    assert longest > max(len(sentence(i)) - 1 for i in range(50))
    plan = BatchPlan(50, 12, 2, 3, 3)
    fixed, free = StepLoader(plan, train, [0, 1], 2), StepLoader(plan, train, [0, 1])
    for step in range(6):
        assert {b.input.shape for b in fixed.step(step)} == {(2, longest)}
    assert {b.target.shape for b in StepLoader(plan, test, [0, 1], 2).step(0)} == {(2, longest)}
    every = [[b for s in range(6) for b in loader.step(s)] for loader in (fixed, free)]
    assert len({b.input.shape for b in every[1]}) > 2
    assert loss_of(every[0]) == pytest.approx(loss_of(every[1]), rel=1e-6)
    assert find_longest(sets(Own(5, lambda i: [1, 2, 3]), None, pad)[0]) == []


def test_each_axis_has_its_own_longest_sample() -> None:
    """Inputs and targets whose lengths have nothing to do with each other."""

    def make(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(1 + i % 5), torch.ones(1 + (i * 3 + 1) % 7)

    def both(rows: list[Any]) -> Any:
        columns = zip(*rows, strict=True)
        inputs, labels = (torch.nn.utils.rnn.pad_sequence(list(c), True) for c in columns)
        return {"x": inputs, "labels": labels}

    train, _ = sets(Own(35, make), None, both)
    for ids in ([0, 1], [5], []):
        batch = load_micro_batch(train, ids, 2)
        assert batch.input["x"].shape == (2, 5) and batch.target.shape == (2, 7)


def test_what_is_longer_than_the_jobs_longest_is_refused() -> None:
    grown = Own(7, lambda i: list(range(3 + i % 2)))
    train, _ = sets(grown, None, pad)
    load_micro_batch(train, [1, 2], 2)
    grown.make = lambda i: list(range(9))
    with pytest.raises(
        RunError, match=r"train samples 1, 2 collate to \[\(8,\), \(8,\)\], the job's"
    ):
        load_micro_batch(train, [1, 2], 2)


def test_a_collate_function_that_changes_its_samples_gets_copies() -> None:
    def popping(rows: list[dict[str, Any]]) -> Any:
        labels = torch.tensor([row.pop("labels") for row in rows])
        return {"x": torch.stack([row["x"] for row in rows]), "labels": labels}

    train, _ = sets(Own(7, lambda i: {"x": X, "labels": i}), None, popping)
    for _ in range(2):
        assert load_micro_batch(train, [3], 4).target.tolist() == [3, 0, 0, 0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            lambda rows: 1 / 0,
            "ZeroDivisionError: division by zero, at tests/test_own_data_collation.py:",
        ),
        (lambda rows: torch.ones(4, 3), "is float32 [4, 3]; valid: (input, target), or a dict"),
        (lambda rows: (rows, torch.ones(4)), "its input holds the text 'a'; valid"),
        (lambda rows: (torch.ones(4), None), "its target holds None; valid"),
        (lambda rows: (torch.ones(4), {}), "its target holds nothing; valid"),
        (lambda rows: (torch.ones(3, 4), torch.ones(4)), "holds float32 [3, 4], for 4 samples"),
    ],
)
def test_a_collate_function_that_gives_no_batch_is_named(given: Any, expected: str) -> None:
    with pytest.raises(JobError) as refused:
        judge(lambda i: "a", given)
    line = str(refused.value)
    assert line.startswith(f"{NAME}: collate of train samples 0, 1, 2, 3") and expected in line


def test_random_numbers_of_a_collate_function_are_found_and_repeat() -> None:
    def masks(rows: list[Any]) -> Any:
        found = torch.tensor(rows).float()
        return found * torch.rand(len(rows)), found

    drawing, plain = sets(Own(9, int), None, masks)[0], sets(Own(9, sentence), None, pad)[0]
    (line,) = collate_warnings(drawing)
    assert line.startswith(f"{NAME}: collate draws random numbers") and not collate_warnings(plain)
    assert not collate_warnings(sets(Own(9, augmented))[0]), "these hang on the sample alone"
    first, again = (load_micro_batch(drawing, [3, 5]).input.tolist() for _ in range(2))
    assert first == again


def test_the_check_tries_layers_with_what_is_collated() -> None:
    assert torch.equal(judge(sentence, pad), pad([sentence(0)])[0][0])
