"""A micro-batch is what reading one sample after another gives, and only what is needed of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from hybrid.data.loader import load_micro_batch
from hybrid.job.errors import RunError


def samples(size: int = 5) -> TensorDataset:
    """Sample i has inputs (2i, 2i + 1) and target i."""
    return TensorDataset(torch.arange(2.0 * size).reshape(size, 2), torch.arange(size))


def one_by_one(sample_set: Any, ids: list[int], size: int | None) -> list[Any]:
    """Inputs and targets as torch's own collation makes them of single samples."""
    rows = [sample_set[i] for i in ids]
    rows += [sample_set[0]] * ((max(1, len(ids)) if size is None else size) - len(ids))
    return default_collate(rows)


def same(got: Any, expected: Any) -> None:
    """Fails unless all tensors are of one kind, layout and value, bit for bit."""
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        got, expected = list(got.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            same(a, b)
        return
    strides = [t.stride() if t.numel() else () for t in (got, expected)]
    kinds = [(t.dtype, t.shape, t.is_contiguous()) for t in (got, expected)]
    assert strides[0] == strides[1] and kinds[0] == kinds[1] and torch.equal(got, expected)


class Doubled(TensorDataset):
    """Gives other inputs than the tensors it holds."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        first, second = super().__getitem__(i)
        return first * 2, second


class Together(Dataset):
    """Reads several samples at once, and keeps what it was asked for."""

    def __init__(self, size: int = 5) -> None:
        self.size, self.asked = size, list[list[int]]()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), i / 7), i

    def __getitems__(self, ids: list[int]) -> list[tuple[torch.Tensor, int]]:
        self.asked.append(ids)
        return [Together.__getitem__(self, i) for i in ids]


class Negated(Together):
    """Changes single samples alone: what its base reads together are others."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), -1.0 * i), i


class Wrapped:
    """Changes another set's samples and hands everything else on to it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, i: int) -> Any:
        first, second = self.inner[i]
        return first + 1, second


class Disguised(Wrapped):
    """Says that it is of the other set's class, as proxies do."""

    @property
    def __class__(self) -> Any:
        return type(self.inner)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    return (torch.randn(5, *shape, generator=draw) * 50).to(dtype)


def images() -> torch.Tensor:
    return drawn(3, 4, 4).to(memory_format=torch.channels_last)


LABELS = torch.tensor([3, 1, 4, 1, 5])
SETS: dict[str, Callable[[], Any]] = {
    "tensors": samples,
    "halves": lambda: TensorDataset(drawn(7, dtype=torch.bfloat16), drawn(dtype=torch.float64)),
    "bytes": lambda: TensorDataset(drawn(2, 3, dtype=torch.uint8), LABELS > 2),
    "tokens": lambda: TensorDataset(drawn(6, dtype=torch.int64), drawn(6, dtype=torch.int32)),
    "empty rows": lambda: TensorDataset(drawn(0), LABELS),
    "channels last": lambda: TensorDataset(images(), LABELS),
    "one channel": lambda: TensorDataset(drawn(1, 4, 4), drawn(3, 1, 1)),
    "columns": lambda: TensorDataset(drawn(9)[:, 2:7], drawn(2)[:, 0]),
    "transposed": lambda: TensorDataset(drawn(8)[:, :5].t(), LABELS.expand(5, 5).t()),
    "the same row": lambda: TensorDataset(torch.ones(1, 3).expand(5, 3), LABELS),
    "a subset": lambda: Subset(TensorDataset(drawn(4), LABELS), [4, 0, 2, 1, -1]),
    "by a tensor": lambda: Subset(samples(9), torch.tensor([8, 0, 2, 1, 3])),  # type: ignore[arg-type]
    "of a subset": lambda: Subset(Subset(samples(9), range(8, 0, -1)), [7, 1, 2, 3, 0]),
    "of a list": lambda: Subset([(drawn(4)[i], i) for i in range(5)], [4, 0, 2, 1, 3]),  # type: ignore[arg-type]
    "derived": lambda: Doubled(drawn(4), LABELS),
    "of a derived": lambda: Subset(Doubled(drawn(4), LABELS), [4, 0, 2, 1, 3]),
    "together": Together,
    "of a set read together": lambda: Subset(Together(9), [8, 0, 2, 1, 3]),
    "negated": Negated,
    "of a negated": lambda: Subset(Negated(9), [8, 0, 2, 1, 3]),
    "wrapped": lambda: Wrapped(samples()),
    "disguised": lambda: Disguised(samples()),
    "wrapped together": lambda: Wrapped(Together()),
    "tuples": lambda: [(drawn(4)[i], i) for i in range(5)],
    "lists": lambda: [[drawn(4)[i], float(i)] for i in range(5)],
    "arrays": lambda: [(numpy.arange(3) * i, numpy.float32(i)) for i in range(5)],
    "dicts": lambda: [({"a": drawn(2)[i], "b": i}, (i, drawn()[i])) for i in range(5)],
}


@pytest.mark.parametrize("name", SETS)
def test_a_micro_batch_is_what_single_samples_give(name: str) -> None:
    asked: list[tuple[list[int], int | None]] = [([3, 1], None), ([2, 2, 4, 0, 1], 5), ([4, 1], 6)]
    for ids, size in [*asked, ([], None), ([], 3), ([-1, 2], 3), ([1, 2, 3], 2)]:
        sample_set = SETS[name]()
        inputs, outputs = one_by_one(sample_set, ids, size)
        got = load_micro_batch(sample_set, ids, size)
        same(got.input, inputs)
        same(got.target, outputs)
        same(got.ids, torch.tensor(ids, dtype=torch.int64))
        first = load_micro_batch(sample_set, ids, size, targets=False)
        same(first.input, inputs)
        second = load_micro_batch(sample_set, ids, size, inputs=False)
        same(second.target, outputs)
        assert first.target is None and second.input is None
        same(first.ids, got.ids)
        same(second.ids, got.ids)


def test_loading_gives_the_samples_of_the_ids_in_their_order() -> None:
    got = load_micro_batch(samples(), [3, 1])
    assert got.input.tolist() == [[6, 7], [2, 3]] and got.target.tolist() == [3, 1]
    assert got.ids.tolist() == [3, 1] and got.ids.dtype == torch.int64


def test_loading_pads_to_a_size_and_names_only_real_samples() -> None:
    got = load_micro_batch(samples(), [3, 1], size=4)
    assert got.input.tolist() == [[6, 7], [2, 3], [0, 1], [0, 1]]
    assert got.target.tolist() == [3, 1, 0, 0] and got.ids.tolist() == [3, 1]
    assert load_micro_batch(samples(), [2, 4], size=2).target.tolist() == [2, 4]


def test_an_empty_micro_batch_has_one_row_and_no_ids() -> None:
    got = load_micro_batch(samples(), [])
    assert got.input.shape == (1, 2) and got.target.shape == (1,)
    assert got.ids.shape == (0,) and got.ids.dtype == torch.int64
    padded = load_micro_batch(samples(), [], size=3)
    assert padded.input.shape == (3, 2) and padded.ids.shape == (0,)


def test_a_set_of_tensors_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, i: int) -> None:
        raise AssertionError(f"sample {i} was read alone")

    monkeypatch.setattr(TensorDataset, "__getitem__", fail)
    assert load_micro_batch(samples(), [3, 1], size=3).target.tolist() == [3, 1, 0]
    twice = Subset(Subset(samples(), [4, 3, 2]), [1, 0])
    assert load_micro_batch(twice, [0, 1], size=3).target.tolist() == [3, 4, 3]


def test_a_set_that_reads_together_is_asked_once() -> None:
    together = Together()
    load_micro_batch(together, [3, 1], size=5)
    load_micro_batch(Subset(together, [4, 2]), [1, 0])
    assert together.asked == [[3, 1, 0], [2, 4]]


def test_a_set_that_gives_too_few_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Together, "__getitems__", lambda self, ids: [self[i] for i in set(ids)])
    with pytest.raises(RunError, match="__getitems__ gave 2 of 3 samples"):
        load_micro_batch(Together(), [3, 1, 3])


def test_nothing_is_read_where_nothing_is_needed() -> None:
    got = load_micro_batch([], [3, 1], size=4, inputs=False, targets=False)
    assert got.input is None and got.target is None and got.ids.tolist() == [3, 1]
    odd = [(torch.ones(2), object())]  # nothing can be made of these targets
    assert load_micro_batch(odd, [0], targets=False).input.shape == (1, 2)
    with pytest.raises(TypeError):
        load_micro_batch(odd, [0], inputs=False)


def test_other_sets_of_tensors_fail_as_single_samples_do() -> None:
    for number in (1, 3):
        several = TensorDataset(*[LABELS] * number)
        with pytest.raises(ValueError, match="values to unpack"):
            load_micro_batch(several, [1, 2, 3])
    with pytest.raises(IndexError, match="index 5 is out of bounds"):
        load_micro_batch(samples(), [1, 5])
    empty = TensorDataset(torch.zeros(4, 0), torch.arange(4))  # torch has another error for it
    with pytest.raises(IndexError, match="index 4 is out of bounds"):
        load_micro_batch(empty, [1, 4])
    last = load_micro_batch(Subset(samples(), [0, -1]), [1, 0])
    assert last.target.tolist() == [4, 0], "as the set itself counts from its end"
