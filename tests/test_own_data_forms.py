"""Samples of a user's own: the forms that are valid, and how others and errors are named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Subset, TensorDataset

from hybrid.data import build_data
from hybrid.data.check import check_samples
from hybrid.data.loader import load_micro_batch
from hybrid.data.samples import JobSet, check_set
from hybrid.data.targets import targets_per_sample
from hybrid.job.errors import JobError, RunError
from hybrid.models.losses import cross_entropy
from tests import own_data
from tests.conftest import small_job
from tests.own_data import Own, Together, pad
from tests.own_samples import NAME, X, Y, judge, sets

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
    own_collate = torch.utils.data.default_collate
    assert targets_per_sample(sets(Subset(own, [1]))[0], cross_entropy) == 1
    assert targets_per_sample(sets(own, None, pad)[0], cross_entropy) == 1
    assert targets_per_sample(sets(plain, None, own_collate)[0], cross_entropy) is None
    assert list(samples) == [(i, i) for i in range(7)] and not hasattr(samples, "fingerprint")


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
