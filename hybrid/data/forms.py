"""This module says what a sample may be, and makes batches of samples.

A sample is `(input, target)`, or a row as Hugging Face's data sets give it: a dict with `labels`
(or `label`), whose other entries are the input. Each of the two is a tensor, an array, a number, or
a tuple, list or dict of them. A collate function of the user's takes samples of any form, and
returns a batch of one of these forms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

LABELS = ("labels", "label")
_PAIR = "valid: (input, target), or a dict with inputs and labels, of tensors"
SAMPLES = (
    f"{_PAIR}, numpy arrays, numbers and tuples, lists or dicts of them; or return (train, test, "
    "collate) with a function that makes a batch of your samples"
)
LENGTHS = "make them alike, or return (train, test, collate) with a function that pads a batch"
BATCHES = f"{_PAIR} with one row a sample, also in tuples, lists and dicts"
WIDEST = 160  # characters that describe a sample


class FormError(ValueError):
    """Says in one line what a sample or a batch is that it must not be."""


def split_sample(sample: Any) -> tuple[Any, Any]:
    """Returns the input and the target of a sample, or of a batch; FormError where it has none.

    Of a dict, the input is a plain dict without the labels. Lists of numbers in it, as Hugging
    Face's data sets give them, become tensors."""
    if isinstance(sample, (tuple, list)):
        if len(sample) == 2:
            return sample[0], sample[1]
    elif isinstance(sample, Mapping):
        names = [name for name in LABELS if name in sample]
        if len(names) == 1:
            found = {key: _from_list(value) for key, value in sample.items()}
            return found, found.pop(names[0])
    raise FormError(f"is {describe(sample)}")


def _from_list(value: Any) -> Any:
    """Returns a list of numbers as a tensor, and anything else as it is."""
    if isinstance(value, list):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):  # of texts, or of lengths that vary
            return value
    return value


def check_sample(sample: Any) -> None:
    """Raises FormError unless a sample can be put into a batch with others like it."""
    for name, part in zip(("input", "target"), split_sample(sample), strict=True):
        if problem := next(_problems(part), None):
            raise FormError(f"is {describe(sample)}: its {name} holds {problem}")


def check_batch(batch: Any, num_rows: int) -> None:
    """Raises FormError unless a collate function has made a batch of tensors of so many rows."""
    for name, part in zip(("input", "target"), split_sample(batch), strict=True):
        leaves = tree_leaves(part)
        wrong = (
            [describe(v) for v in leaves if not isinstance(v, torch.Tensor)]
            if leaves
            else ["nothing"]
        )
        for tensor in leaves if not wrong else []:
            if tensor.shape[:1] != (num_rows,):
                wrong.append(f"{describe(tensor)}, for {num_rows} samples")
        if wrong:
            raise FormError(f"is {describe(batch)}: its {name} holds {wrong[0]}")


def _problems(value: Any) -> Iterator[str]:
    """Gives what no tensor can be made of in an input or a target."""
    if isinstance(value, (Mapping, tuple, list)):
        if not value:
            yield "nothing"
        for one in () if isinstance(value, Mapping) else value:
            yield from _problems(one)
        for key, one in value.items() if isinstance(value, Mapping) else ():
            yield from (f"{problem} as {key!r}" for problem in _problems(one))
    elif isinstance(value, (numpy.ndarray, numpy.generic)):
        if value.dtype.kind not in "biuf":
            yield describe(value)
    elif not isinstance(value, (torch.Tensor, bool, int, float)):
        yield describe(value)


def collate_rows(rows: Sequence[Any], inputs: bool, targets: bool) -> tuple[Any, Any]:
    """Puts samples together as torch does, with one row a sample along axis 0.

    Raises FormError where one is no sample, or where they do not fit together."""
    pairs = [split_sample(row) for row in rows]
    return (
        default_collate([x for x, _ in pairs]) if inputs else None,
        default_collate([y for _, y in pairs]) if targets else None,
    )


def first_odd(rows: Sequence[Any]) -> tuple[int, str] | None:
    """Finds the first row that is of another form than row 0, and says how they differ."""
    outlines = [_outlines(row) for row in rows]
    for i, outline in enumerate(outlines):
        for name, own, first in zip(("input", "target"), outline, outlines[0], strict=True):
            if own != first:
                return i, f"have {name}s that differ, {first} and {own}"
    return None


def _outlines(row: Any) -> list[str]:
    try:
        return [describe(part) for part in split_sample(row)]
    except FormError as error:
        return [str(error), ""]


def describe(value: Any) -> str:
    """Says in few words what a value is: `(float32 [16], int)`."""
    text = _describe(value)
    return text if len(text) <= WIDEST else text[: WIDEST - 3] + "..."


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, numpy.ndarray):
        return f"{value.dtype} array {list(value.shape)}"
    if isinstance(value, str):
        return f"the text {value[:30]!r}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_describe(v) for v in value[:4])
        if len(value) > 4:
            inner += f", ... {len(value)} in all"
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if value is None:
        return "None"
    kind = type(value)
    home = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{home}{kind.__qualname__}"
