"""Samples of a user's own: their forms, their random numbers, their collation, and their errors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset, TensorDataset

from hybrid.data import build_data
from hybrid.data.batches import BatchPlan
from hybrid.data.check import check_samples, collate_warnings
from hybrid.data.collation import find_longest
from hybrid.data.loader import MicroBatch, load_micro_batch
from hybrid.data.samples import JobSet, check_set, job_sets
from hybrid.data.seeds import generator_states, same_states
from hybrid.data.steps import StepLoader
from hybrid.data.targets import targets_per_sample
from hybrid.job.errors import JobError, RunError
from hybrid.models.losses import cross_entropy
from tests import own_data
from tests.conftest import small_job
from tests.own_data import Own, Together, augmented, noise, pad, sentence

NAME = "data.name = 'tests.own_data:augmented_sets'"
X, Y = torch.ones(3), torch.tensor(1)


def sets(train: Any, test: Any = None, collate: Any = None) -> tuple[Any, Any]:
    return job_sets(NAME, 5, train, train if test is None else test, collate)


def judge(make: Callable[[int], Any], collate: Any = None, size: int = 7) -> Any:
    """What the check of a job makes of such samples."""
    return check_samples(small_job(), *sets(Own(size, make), None, collate))


# Forms


GOOD: dict[str, Callable[[int], Any]] = {
    "pair": lambda i: (X, Y),
    "list": lambda i: [X, 2.5],
    "numbers": lambda i: (i, i / 2),
    "arrays": lambda i: (numpy.ones((2, 3)), numpy.int64(i)),
    "parts of a target": lambda i: (X, (Y, X.sum())),
    "names of a target": lambda i: (X, {"y": Y, "z": [X, i]}),
    "names of an input": lambda i: ({"x": X, "mask": X > 0}, Y),
    "labels": lambda i: {"input_ids": X, "mask": numpy.ones(2), "labels": i},
    "label": lambda i: {"pixel_values": X, "label": i},
    "lists in a row": lambda i: {"input_ids": [i, 2, 3], "labels": [[1, 2], [3, 4]]},
}


@pytest.mark.parametrize("name", GOOD)
def test_such_samples_are_valid(name: str) -> None:
    samples, _ = sets(Own(7, GOOD[name]))
    judge(GOOD[name])
    batch = load_micro_batch(samples, [3, 1], 3)
    leaves = tree_leaves((batch.input, batch.target))
    assert all(isinstance(leaf, torch.Tensor) and leaf.shape[0] == 3 for leaf in leaves)


def test_a_row_is_split_into_input_and_target() -> None:
    rows = Own(7, lambda i: {"input_ids": [i, 2, 3], "labels": i, "mask": X})
    batch = load_micro_batch(sets(rows)[0], [4, 2])
    assert list(batch.input) == ["input_ids", "mask"]
    assert batch.input["input_ids"].tolist() == [[4, 2, 3], [2, 2, 3]]
    assert batch.target.tolist() == [4, 2]
    only = load_micro_batch(sets(rows)[0], [4, 2], targets=False)
    assert only.target is None and list(only.input) == ["input_ids", "mask"]
    assert list(judge(rows.make)) == ["input_ids", "mask"]


def test_a_data_set_of_hugging_face_is_taken_as_it_is() -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"input_ids": [[i, 2] for i in range(9)], "label": list(range(9))}
    samples, _ = sets(datasets.Dataset.from_dict(columns))
    batch = load_micro_batch(samples, [4, 2], 3)
    assert batch.input["input_ids"].tolist() == [[4, 2], [2, 2], [0, 2]]
    assert batch.target.tolist() == [4, 2, 0]


VARY = "train samples 0 and 1 have inputs that differ, "
BAD: dict[str, tuple[Callable[[int], Any], str]] = {
    "a tensor": (lambda i: X, "train sample 0 is float32 [3]; valid: (input, target), or a dict"),
    "two in a tensor": (lambda i: torch.ones(2, 3), "train sample 0 is float32 [2, 3]; valid"),
    "an array": (lambda i: numpy.ones(2), "train sample 0 is float64 array [2]; valid"),
    "a number": (lambda i: i, "train sample 0 is int; valid"),
    "None": (lambda i: None, "train sample 0 is None; valid"),
    "a text": (lambda i: "ab", "train sample 0 is the text 'ab'; valid"),
    "three": (lambda i: (X, X, Y), "train sample 0 is (float32 [3], float32 [3], int64 []); valid"),
    "one": (lambda i: (X,), "train sample 0 is (float32 [3]); valid"),
    "other names": (lambda i: {"input": X, "target": Y}, "0 is {input: float32 [3], target: int"),
    "both names": (
        lambda i: {"x": X, "label": Y, "labels": Y},
        "label: int64 [], labels: int64 []",
    ),
    "labels alone": (lambda i: {"labels": Y}, "its input holds nothing; valid"),
    "no target": (lambda i: (X, None), "its target holds None; valid"),
    "None inside": (lambda i: ((X, None), Y), "its input holds None; valid"),
    "a text as target": (lambda i: (X, "cat"), "its target holds the text 'cat'; valid"),
    "a text as input": (lambda i: (f"text {i}", Y), "its input holds the text 'text 0'; valid"),
    "a column of texts": (
        lambda i: {"sentence": "a b", "ids": [1, 2], "label": i},
        "its input holds the text 'a b' as 'sentence'; valid",
    ),
    "texts in an array": (
        lambda i: (numpy.array(["a"]), Y),
        "its input holds <U1 array [1]; valid",
    ),
    "an object": (lambda i: (object(), Y), "its input holds object; valid"),
    "lengths": (lambda i: (torch.ones(3 + i % 5), Y), VARY + "float32 [3] and float32 [4]; make"),
    "lengths in rows": (
        lambda i: {"ids": [1] * (i + 1), "labels": i},
        VARY
        + "{ids: int64 [1]} and {ids: int64 [2]}; make them alike, or return (train, test, col",
    ),
    "names that vary": (lambda i: ({f"x{i}": X}, Y), VARY + "{x0: float32 [3]} and {x1: float32"),
    "later": (lambda i: (X, "cat" if i == 3 else Y), "train sample 3 is (float32 [3], the text 'c"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_samples_are_refused_in_one_line(name: str) -> None:
    make, expected = BAD[name]
    with pytest.raises(JobError) as refused:
        judge(make)
    line = str(refused.value)
    assert expected in line and line.startswith(f"{NAME}: train sample") and "\n" not in line


def test_the_check_reads_the_test_set_too_and_sets_of_tensors() -> None:
    good = Own(7, lambda i: (X, Y))
    with pytest.raises(JobError, match="test sample 0 is float32"):
        check_samples(small_job(), *sets(good, Own(3, lambda i: X)))
    with pytest.raises(JobError, match=r"'random': train sample 0 is \(float32 \[3\]\); valid"):
        check_samples(small_job(), *sets(TensorDataset(torch.ones(4, 3))))


def test_what_a_data_function_must_return(monkeypatch: pytest.MonkeyPatch) -> None:
    good = Own(7, lambda i: (X, Y))

    class NoLength(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield X, Y

    for returned, expected in {
        "dict": ({"train": good}, "must return (train, test) or (train, test, collate)"),
        "four": ((good, good, pad, 3), "must return (train, test)"),
        "no function": (
            (good, good, "pad"),
            "collate, the third it returns, must be a function, not",
        ),
        "a loader": (
            (DataLoader(good), good),
            "the train set is a DataLoader; return its data set",
        ),
        "iterable": ((good, NoLength()), "the test set needs a length and indexing"),
        "nothing": ((good, None), "the test set needs a length and indexing, not a NoneType"),
        "empty": (([], good), "the train set is empty"),
    }.values():
        monkeypatch.setattr(own_data, "slow", lambda returned=returned: returned)
        with pytest.raises(JobError) as refused:
            build_data(small_job(data={"name": "tests.own_data:slow", "options": {}}))
        assert expected in str(refused.value)
    check_set("a list", [1])


def test_a_set_hands_on_what_it_has_and_tensors_stay_as_they_are() -> None:
    plain = TensorDataset(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    train, test = sets(plain, Subset(plain, [1, 2]))
    assert train is plain and isinstance(test, Subset)
    assert isinstance(sets(plain, plain, torch.utils.data.default_collate)[0], JobSet)
    own = Own(7, lambda i: (i, i))
    own.vocab_size = 9  # type: ignore[attr-defined]
    samples, _ = sets(own)
    assert samples.vocab_size == 9 and len(samples) == 7 and samples[3] == (3, 3)
    own.targets_per_sample = 1  # type: ignore[attr-defined]
    assert targets_per_sample(sets(Subset(own, [1]))[0]) == 1
    assert targets_per_sample(sets(own, None, pad)[0]) == 1
    assert targets_per_sample(sets(plain, None, torch.utils.data.default_collate)[0]) is None
    assert list(samples) == [(i, i) for i in range(7)] and not hasattr(samples, "fingerprint")


# Random numbers


def steps_of(samples: Any, plan: BatchPlan, steps: range, size: int | None = None) -> list[Any]:
    """Each step's samples as {(step, sample): (input, target)}, over all shares."""
    loader = StepLoader(plan, samples, range(plan.shares), size)
    found: dict[Any, Any] = {}
    for step in steps:
        for batch in loader.step(step):
            for i, row, target in zip(batch.ids.tolist(), batch.input, batch.target, strict=False):
                found[step, i] = (row.tolist(), target.tolist())
    return sorted(found.items())


@pytest.mark.parametrize("together", [False, True])
def test_random_samples_are_the_same_for_any_cut_of_the_batches(together: bool) -> None:
    train, test = job_sets(NAME, 5, *own_data.augmented_sets(together), None)
    plans = [BatchPlan(50, 12, shares, cuts, 3) for shares, cuts in ((1, 1), (4, 2), (3, 5))]
    runs = [steps_of(train, plan, range(8), size) for plan in plans for size in (None, 12)]
    assert all(run == runs[0] for run in runs) and len(runs[0]) == 12 * 4 + 2 + 12 * 3
    by_epoch = {i: value for (step, i), value in runs[0] if step < 5}
    again = {i: value for (step, i), value in runs[0] if step >= 5}
    assert all(again[i] != by_epoch[i] for i in again), "each epoch draws other numbers"
    evaluated = [steps_of(test, BatchPlan(11, 4, n, 2, None), range(3)) for n in (1, 3)]
    assert evaluated[0] == evaluated[1]
    other = job_sets(NAME, 6, *own_data.augmented_sets(together), None)[0]
    assert steps_of(other, plans[0], range(1)) != steps_of(train, plans[0], range(1))


def test_a_test_set_draws_other_numbers_than_a_train_set() -> None:
    train, test = sets(Own(7, augmented))
    assert train[3][0].tolist() != test[3][0].tolist()
    assert train[3][0].tolist() == train[3][0].tolist()


def test_reading_leaves_the_generators_as_they_were() -> None:
    for samples in sets(Own(7, augmented)) + sets(Together(7, augmented)):
        before = generator_states()
        load_micro_batch(samples, [3, 1], 4)
        assert same_states(before, generator_states())
        assert samples[1] is not None and same_states(before, generator_states())
    for draw in (lambda: torch.rand(()), lambda: numpy.random.rand(), random.random, noise):
        before = generator_states()
        draw(*([1] if draw is noise else []))
        assert not same_states(before, generator_states()), "each generator is looked at"


def test_a_set_that_reads_together_is_asked_once_unless_it_draws() -> None:
    asked: list[list[int]] = []

    class Counting(Together):
        def __getitems__(self, ids: list[int]) -> list[Any]:
            asked.append(ids)
            return super().__getitems__(ids)

    load_micro_batch(sets(Counting(7, lambda i: (X, i)))[0], [3, 1], 4)
    assert asked == [[3, 1, 0]]
    asked.clear()
    drawing = sets(Counting(7, augmented))[0]
    load_micro_batch(drawing, [3, 1])
    load_micro_batch(drawing, [2, 4])
    assert asked == [[3, 1], [3], [1], [2], [4]]


# Collation


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
        (lambda rows: 1 / 0, "ZeroDivisionError: division by zero, at tests/test_own_data.py:"),
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


# Errors


@pytest.mark.parametrize("kind", [Own, Together])
def test_an_error_names_the_set_the_sample_and_the_line(kind: Any) -> None:
    broken, _ = own_data.failing(17)
    samples, _ = sets(Subset(kind(50, broken.make), range(10, 50)))
    load_micro_batch(samples, [3, 6, 8])
    with pytest.raises(RunError) as raised:
        load_micro_batch(samples, [3, 6, 7, 8])
    line = f"{NAME}: train sample 7: KeyError: 'no such picture', at tests/own_data.py:"
    assert str(raised.value).startswith(line) and isinstance(raised.value.__cause__, KeyError)
    with pytest.raises(JobError, match=r"train sample 0: KeyError.*own_data"):
        check_samples(small_job(), *sets(own_data.failing(0)[0]))


def test_samples_that_stop_fitting_are_named() -> None:
    samples, _ = sets(Own(50, lambda i: (torch.ones(3 + (i == 17)), i)))
    with pytest.raises(RunError, match="train samples 3 and 17 have inputs that differ"):
        load_micro_batch(samples, [3, 9, 17])
    texts, _ = sets(Own(50, lambda i: (X, "a" if i == 9 else i)))
    with pytest.raises(RunError, match=r"train sample 9 is .*its target holds the text 'a'"):
        load_micro_batch(texts, [3, 9, 17])
