"""This module makes micro-batches of a job's samples, by torch's collation or by the user's own.

A collate function of the user's may pad samples to the longest of each micro-batch. Where an engine
needs shapes that stay, the longest samples of the job are added to each micro-batch before it is
collated, and their rows are cut off again."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map

from ..job.errors import RunError
from ..job.users_code import passes
from ..launch.exchange import gather_objects
from .forms import (
    BATCHES,
    LENGTHS,
    SAMPLES,
    FormError,
    check_batch,
    check_sample,
    collate_rows,
    first_odd,
    split_sample,
)
from .samples import JobSet
from .seeds import kept_generators, sample_seed, seed_generators

MOST_NAMED = 8  # samples of a batch that failed


def load_rows(
    samples: JobSet,
    ids: Sequence[int],
    padding: int,
    epoch: int,
    fixed: bool,
    inputs: bool = True,
    targets: bool = True,
) -> tuple[Any, Any]:
    """Returns the input and the target of a micro-batch; one that is not asked for is None.

    padding: rows after those of `ids`, which are copies of sample 0. fixed: all micro-batches have
    the shapes of the job's longest samples. Raises RunError, which names the samples."""
    ids = [*ids, *[0] * min(padding, 1)]
    draws = samples.collate or type(samples.samples) not in (list, tuple)
    with kept_generators() if draws else contextlib.nullcontext():
        rows = samples.read(ids, epoch)
        rows += [copy.deepcopy(rows[-1]) for _ in range(padding - 1)]
        if samples.collate is None:
            return _stack(samples, rows, ids, inputs, targets)
        longest = copy.deepcopy(find_longest(samples) if fixed else [])
        # Random numbers of a collate function hang on the micro-batch; `collate_draws` finds them.
        seed_generators(sample_seed(samples.seed, samples.side, epoch, ids[0]))
        batch = collate(samples, rows + longest, ids)
    if longest:
        batch = tree_map(lambda tensor: tensor[: len(rows)], batch)
        _require_shapes(samples, batch, ids)
    return batch[0] if inputs else None, batch[1] if targets else None


def collate(samples: JobSet, rows: list[Any], ids: Sequence[int]) -> tuple[Any, Any]:
    """Returns the input and the target that the set's collate function makes of rows.

    Raises RunError where the function fails, or gives anything but a batch of tensors."""
    assert samples.collate is not None
    what, size = f"collate of {_name(samples, ids)}", len(rows)
    try:
        batch = samples.collate(rows)
    except BaseException as error:  # a user's function may raise anything
        if passes(error):
            raise
        raise samples.error(what, error) from error
    try:
        check_batch(batch, size)
    except FormError as error:
        raise RunError(f"{samples.named}: {what} {error}; {BATCHES}") from None
    inputs, target = tree_map(lambda tensor: tensor.detach(), split_sample(batch))
    return inputs, target


@torch.no_grad()  # no gradient flows into data
def _stack(
    samples: JobSet, rows: Sequence[Any], ids: Sequence[int], inputs: bool, targets: bool
) -> tuple[Any, Any]:
    """Collates rows as torch does; the error says which sample does not fit."""
    try:
        found = collate_rows(rows, inputs, targets)
        asked = [tree_leaves(part) for part in found if part is not None]
        if all(asked) and all(isinstance(v, torch.Tensor) for part in asked for v in part):
            return found
        why: Exception = FormError("hold what no tensor can hold")
    except Exception as error:  # torch raises TypeError, RuntimeError and others
        why = error
    for i, row in zip(ids, rows, strict=False):
        try:
            check_sample(row)
        except FormError as error:
            raise RunError(
                f"{samples.named}: {samples.side} sample {i} {error}; {SAMPLES}"
            ) from why
    if odd := first_odd(rows):
        which = f"{samples.side} samples {ids[0]} and {ids[min(odd[0], len(ids) - 1)]}"
        raise RunError(f"{samples.named}: {which} {odd[1]}; {LENGTHS}") from why
    raise samples.error(f"{_name(samples, ids)} cannot be put together", why) from why


def _name(samples: JobSet, ids: Sequence[int]) -> str:
    named = ", ".join(map(str, ids[:MOST_NAMED])) + (", ..." if len(ids) > MOST_NAMED else "")
    return f"{samples.side} samples {named}" if len(ids) > 1 else f"{samples.side} sample {named}"


def _require_shapes(samples: JobSet, batch: tuple[Any, Any], ids: Sequence[int]) -> None:
    """Raises RunError where a micro-batch is longer than the job's longest samples in epoch 0."""
    shapes, wanted = [tuple(t.shape[1:]) for t in tree_leaves(batch)], samples.longest.shapes
    if shapes != wanted:
        raise RunError(
            f"{samples.named}: {_name(samples, ids)} collate to {shapes}, the job's longest "
            f"samples to {wanted}, and this strategy needs one shape: pad samples to one length"
        )


def find_longest(samples: JobSet, together: bool = False) -> list[Any]:
    """Returns the rows that make all collated micro-batches of a job alike in shape.

    Each sample of the job is read and collated once, alone; `together`, each rank does this for its
    part, and the first call is collective. The rows are empty where all samples are alike."""
    longest = samples.longest
    if samples.collate is None:
        return []
    if longest.rows is None:
        together = together and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        mine = _sizes(longest.sets, rank, world_size)
        every = gather_objects(mine) if together else [mine]
        chosen = set[tuple[int, int]]()
        for axis in sorted({axis for sizes in every for axis in sizes}):
            ends = [end for sizes in every for end in sizes.get(axis, [])]
            if min(ends)[0] < max(ends)[0]:
                chosen.add(max(ends)[1:])
        rows = [_collate_alone(longest.sets[-side], -i)[0] for side, i in sorted(chosen)]
        if rows:
            batch = collate(samples, copy.deepcopy(rows), [-i for _, i in sorted(chosen)])
            longest.shapes = [tuple(t.shape[1:]) for t in tree_leaves(batch)]
        longest.rows = rows
    return longest.rows


_Ends = list[tuple[int, int, int]]  # sizes, each with the set and the sample, both times -1


def _sizes(sets: Sequence[JobSet], rank: int, world_size: int) -> dict[tuple[int, int], _Ends]:
    """Finds the least and the greatest size of each (tensor, axis) over this rank's samples.

    Of equal sizes the greatest counts, so that it is the first sample's for any number of ranks."""
    found: dict[tuple[int, int], _Ends] = {}
    for side, one in enumerate(sets):
        for i in range(rank, len(one), world_size):
            for leaf, tensor in enumerate(tree_leaves(_collate_alone(one, i)[1])):
                for axis, size in enumerate(tensor.shape):
                    ends = [*found.get((leaf, axis), []), (size, -side, -i)]
                    found[leaf, axis] = [min(ends), max(ends)]
    return found


def _collate_alone(samples: JobSet, i: int) -> tuple[Any, tuple[Any, Any]]:
    """Returns a sample, and the batch that it makes alone."""
    with kept_generators():
        row = samples.read([i], 0)[0]
        kept = copy.deepcopy(row)
        seed_generators(sample_seed(samples.seed, samples.side, 0, i))
        return kept, collate(samples, [row], [i])
