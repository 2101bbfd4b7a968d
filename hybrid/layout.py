"""This module owns the degrees of parallelism, the ranks' coordinates, and how a batch is split.

One object, `Layout`, owns all degrees; nothing else multiplies them. Ranks are numbered stage by
stage: rank = stage * dp + column, DeepSpeed's order for pipelines with data parallelism
(https://deepspeed.readthedocs.io/en/latest/pipeline.html). The module is pure Python."""

import dataclasses
import itertools
from collections.abc import Sequence


class LayoutError(ValueError):
    """Says that degrees or a partition do not fit the processes or layers of the run."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Arranges `world_size` processes.

    `pp`: pipeline stages. `dp`: data-parallel ranks, each on its own samples; dp = `replicate`
    copies of the training state x `shard` pieces that each copy is cut into. Raises LayoutError
    where a degree is below 1 or this product differs."""

    pp: int = 1
    dp: int = 1
    replicate: int = 1
    shard: int = 1

    def __post_init__(self) -> None:
        for axis, degree in dataclasses.asdict(self).items():
            if degree < 1:
                raise LayoutError(f"{axis} = {degree}: a degree is at least 1")
        if self.replicate * self.shard != self.dp:
            raise LayoutError(
                f"replicate {self.replicate} x shard {self.shard} is not dp = {self.dp}"
            )

    @property
    def world_size(self) -> int:
        """Return the number of processes."""
        return self.pp * self.dp

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of `rank`."""
        return rank // self.dp

    def dp_rank(self, rank: int) -> int:
        """Return the data-parallel rank (column) of `rank`: which share of a batch it computes."""
        return rank % self.dp

    def to_dict(self) -> dict[str, int]:
        """Return the degrees by name."""
        return dataclasses.asdict(self)


def fill_degrees(nproc: int, first: int | None, second: int | None, names: str) -> tuple[int, int]:
    """Return two degrees whose product is `nproc`, where none, one or both are given.

    With neither given, the first is 1. Raises LayoutError, which begins with `names`, where no such
    degrees exist."""
    if first is None and second is None:
        return 1, nproc
    if first and second and first * second != nproc:
        raise LayoutError(f"{names}: {first} x {second} is not {nproc} processes")
    given = first or second or 1
    if nproc % given:
        raise LayoutError(f"{names}: {first or '?'} x {second or '?'} is not {nproc} processes")
    return first or nproc // given, second or nproc // given


def split_sizes(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` sizes that differ by at most one, larger ones first."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def split(items: Sequence[int], parts: int) -> list[list[int]]:
    """Split `items` into `parts` runs, in order, of the lengths of `split_sizes`."""
    return [[items[i] for i in run] for run in make_ranges(split_sizes(len(items), parts))]


def micro_batch_size(global_batch: int, dp: int, micro_batches: int) -> int:
    """Return the samples in the largest micro-batch, the fixed size where a layout needs one."""
    share = split_sizes(global_batch, dp)[0]
    return split_sizes(share, micro_batches)[0]


def partition_uniform(num_layers: int, stages: int) -> list[range]:
    """Return the layers of each stage, as equal in number as possible, later stages smaller."""
    return make_ranges(split_sizes(num_layers, stages))


def partition_by_weight(weights: Sequence[int], stages: int) -> list[range]:
    """Return the layers of each stage so that the heaviest stage is as light as possible.

    `weights` is one number a layer, such as its parameters; no stage is empty. It is dynamic
    programming over cut points, O(stages * layers**2); ties go to the earlier cut."""
    total, layers = list(itertools.accumulate(weights, initial=0)), len(weights)
    best: list[dict[int, tuple[int, list[int]]]] = [{0: (0, [])}]
    for stage in range(1, stages + 1):
        row: dict[int, tuple[int, list[int]]] = {}
        for stop in range(stage, layers - (stages - stage) + 1):
            options = [
                (max(worst, total[stop] - total[start]), [*sizes, stop - start])
                for start, (worst, sizes) in best[-1].items()
                if start < stop
            ]
            row[stop] = min(options, key=lambda option: option[0])
        best.append(row)
    return make_ranges(best[-1][layers][1])


def partition_explicit(sizes: Sequence[int], num_layers: int, stages: int) -> list[range]:
    """Return each stage's layers from their numbers; raises LayoutError where these do not fit."""
    if len(sizes) != stages or sum(sizes) != num_layers:
        raise LayoutError(
            f"partition {list(sizes)} names {len(sizes)} stages and {sum(sizes)} layers, "
            f"the run has {stages} stages and {num_layers} layers"
        )
    return make_ranges(sizes)


def make_ranges(sizes: Sequence[int]) -> list[range]:
    """Return consecutive ranges of these sizes, from 0 on."""
    stops = itertools.accumulate(sizes)
    return [range(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
