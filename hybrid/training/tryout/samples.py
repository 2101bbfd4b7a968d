"""This module looks at what the data set gives: twice the same, finite, and of one shape."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ...data.loader import MicroBatch, load_micro_batch, reader_of
from .finding import STAGED, Finding, list_names
from .nested import NoRows, all_finite, differs, is_float, take_rows, tensors_in
from .trial import Trial

SCANNED = 2**24  # numbers of a set of tensors that are looked through before the start
MOST = 4096  # samples of a step that are read again after it failed


def check_samples(trial: Trial) -> list[Finding]:
    """Find samples that differ when they are read again, in halves, and shapes that vary."""
    half = len(trial.ids) // 2
    places = [trial.ids[:half], trial.ids[half:]] if half else [trial.ids]
    again = [trial.load(ids) for ids in places]
    shapes = [_shapes(part) for part in (trial.batch, *again)]
    found = list[Finding]()
    if any(shape != shapes[0] for shape in shapes):
        fixed = [_shapes(trial.load(ids, size=len(ids))) for ids in places]
        found = _vary(trial, half, fixed) if fixed[0] != fixed[-1] else []
        # Rows of other lengths cannot be held against one another.
        places, again = [trial.ids], [trial.load(trial.ids)]
    return found + _read_twice(trial, zip(places, again, strict=True))


def _shapes(part: MicroBatch) -> list[tuple[int, ...]]:
    return [tuple(t.shape[1:]) for t in tensors_in(part.input)]


def _vary(trial: Trial, half: int, shapes: list[list[tuple[int, ...]]]) -> list[Finding]:
    """Tell of inputs whose shapes hang on which samples are batched, padded for a pipeline too."""
    one, other = (", ".join(str(list(s)) for s in found) for found in shapes)
    text = f"inputs of samples 0 to {half - 1} have the shape {one} a sample, those after {other}"
    mend = "shapes between stages are fixed; pad every batch to one length in the collate function"
    return [Finding(f"{trial.data_name}: {text}: {mend}", STAGED, fatal=True)]


def _read_twice(trial: Trial, again: Iterable[tuple[list[int], MicroBatch]]) -> list[Finding]:
    """Tell of samples that differ from what they were in the batch."""
    wrong, parts = list[str](), set[str]()
    for ids, part in again:
        for row, i in enumerate(ids):
            one, other = _row(trial.batch, i, len(trial.ids)), _row(part, row, len(ids))
            odd = {name for name in one if differs(one[name], other[name])}
            parts |= odd
            wrong += [f"sample {i}"] if odd else []
    if not wrong:
        return []
    what = f"{' and '.join(sorted(parts))} of {list_names(wrong)}"
    return [
        Finding(
            f"{trial.data_name}: {what} differed when read a second time, so that every run trains "
            "on other data; have a sample depend on its index, and on torch's, random's or numpy's "
            "global generator alone"
        )
    ]


def _row(part: MicroBatch, row: int, total: int) -> dict[str, Any]:
    """Return the input and the target of one sample; all of them where there are no rows."""
    found = {}
    for name, value in (("input", part.input), ("target", part.target)):
        try:
            found[name] = take_rows(value, [row], total)
        except NoRows:
            found[name] = None
    return found


def _find_not_finite(
    samples: Sequence[Any], ids: Sequence[int], nan_alone: bool
) -> tuple[int, str] | None:
    """Return the first of some samples that is not finite, and its part: input or target.

    nan_alone: infinite numbers are let through, as in a mask."""
    for i in ids:
        sample = load_micro_batch(samples, [i])
        for part, value in (("input", sample.input), ("target", sample.target)):
            for tensor in filter(is_float, tensors_in(value)):
                if bool(tensor.isnan().any()) or not (nan_alone or bool(tensor.isfinite().all())):
                    return i, part
    return None


def blame_samples(samples: Sequence[Any], ids: Sequence[int]) -> str | None:
    """Say which sample of a failed step is not finite; None where all are, or cannot be read."""
    for nan_alone in (True, False):  # infinite numbers may stand in a mask, nan is in none
        try:
            found = _find_not_finite(samples, ids[:MOST], nan_alone)
        except Exception:  # the set's own words, and it gave the samples before
            return None
        if found:
            i, part = found
            return f"the {part} of sample {i} of the train set is not finite"
    return None


def suspect_samples(trial: Trial) -> list[int]:
    """List samples that are not finite: of the batch, and of a set of tensors all.

    Whether that is wrong only a pass over them shows: a model may take nan for a missing value."""
    total, found = len(trial.ids), set[int]()
    if not all_finite((trial.batch.input, trial.batch.target)):
        found |= {i for i in trial.ids if not _row_finite(trial.batch, i, total)}
    if reader_of(trial.samples) is TensorDataset:
        for tensor in trial.samples.tensors:  # type: ignore[attr-defined]
            if is_float(tensor) and 0 < tensor.numel() <= SCANNED:
                wrong = ~tensor.flatten(1).isfinite().all(1) if tensor.dim() > 1 else None
                wrong = ~tensor.isfinite() if wrong is None else wrong
                found |= set(torch.nonzero(wrong).flatten()[:1].tolist())
    return sorted(found)


def _row_finite(batch: MicroBatch, row: int, total: int) -> bool:
    try:
        return all_finite(take_rows((batch.input, batch.target), [row], total))
    except NoRows:
        return False
