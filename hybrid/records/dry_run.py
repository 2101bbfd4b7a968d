"""This module defines what a dry-run says: what one rank of a job holds and sends."""

import dataclasses
from collections import Counter
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Shard:
    """Is a rank's part of one tensor of the training state.

    key: "weight", or the optimizer's, such as "exp_avg". shape: of the whole tensor. local_shape
    and bytes: of the part, whose first element is `start` in the whole one, flattened."""

    name: str
    key: str
    shape: list[int]
    local_shape: list[int]
    start: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """Counts one kind of collective of one step, over groups of one size.

    bytes: of the whole tensors that were gathered, reduced or sent. sent_bytes: the part of them
    that this rank sends in a ring."""

    op: str
    group_size: int
    calls: int
    bytes: int
    sent_bytes: float


@dataclasses.dataclass(frozen=True)
class DryRun:
    """Records what one rank of `world` holds and sends in one optimizer step.

    Parameters are counted in elements, frozen ones too. memory_bytes: the peak of all live tensor
    storages in the first steps, this one among them. refused: why the job cannot run so, or cannot
    be played; then what would have been counted is None or empty."""

    strategy: str
    world: int
    rank: int
    layout: dict[str, int] | None = None
    parameters_total: int | None = None
    parameters_here: int | None = None
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    memory_bytes: int | None = None
    refused: str | None = None
    shards: list[Shard] = dataclasses.field(default_factory=list)
    not_counted: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield what a person reads: tensors that are cut alike stand on one line."""
        degrees = ", ".join(f"{axis} {n}" for axis, n in (self.layout or {}).items() if n > 1)
        yield f"{self.strategy}, rank {self.rank} of {self.world}" + (degrees and f": {degrees}")
        if self.refused is not None:
            yield f"refused: {self.refused}"
            return
        yield f"parameters: {self.parameters_here:,} of {self.parameters_total:,} are on this rank"
        alike = Counter[tuple[str, ...]]()
        held = Counter[tuple[str, ...]]()
        for shard in self.shards:
            kind = shard.key, str(shard.shape), str(shard.local_shape)
            alike[kind] += 1
            held[kind] += shard.bytes
        for (key, whole, here), number in alike.items():
            size = held[key, whole, here]
            yield f"  {number:4} x {key} {whole}: {here} here, {size:,} bytes together"
        yield "collectives of one step:" + ("" if self.collectives else " none")
        for one in self.collectives:
            yield (
                f"  {one.op} over {one.group_size} ranks: {one.calls} calls, {one.bytes:,} bytes "
                f"({one.sent_bytes:,.0f} sent by this rank)"
            )
        yield f"memory: {self.memory_bytes:,} bytes at the peak of a step (tensor storages)"
