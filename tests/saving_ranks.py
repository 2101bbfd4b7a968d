"""Four ranks that are threads of this process and save a state of three tensors together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hybrid.checkpoint import save
from hybrid.checkpoint.pieces import WEIGHT, Piece, shares_of
from hybrid.checkpoint.save import StateHashes
from hybrid.checkpoint.snapshot import Snapshot

RANKS = 4
VALUES: dict[str, Any] = {
    "samples": 0, "strategy": "ddp", "layout": {}, "world_size": RANKS, "job": {}, "versions": {},
    "rng": [], "loss_scale": None, "record": {"evals": []},
}  # fmt: skip


def pieces(rank: int, seed: int = 0) -> list[Piece]:
    """What a rank holds of three tensors: replicated, cut in odd parts, on ranks 1 and 3 alone."""
    draw = torch.Generator().manual_seed(seed)
    whole = {n: torch.randn(s, generator=draw) for n, s in {"a": (3, 7), "b": (11,)}.items()}
    found = [Piece("a", WEIGHT, (3, 7), whole["a"], 0, (rank, RANKS))]
    start, end = 11 * rank // RANKS, 11 * (rank + 1) // RANKS
    found.append(Piece("b", WEIGHT, (11,), whole["b"][start:end].clone(), start))
    if rank % 2:
        found.append(Piece("b", "step", (), torch.tensor(float(seed)), 0, (rank // 2, 2)))
    return found


def snapshot(rank: int, step: int, seed: int = 0) -> Snapshot:
    """What a rank saves."""
    own = {"rng/torch": torch.full((5,), step, dtype=torch.uint8)}
    return Snapshot(step, shares_of(pieces(rank, seed)), own, {"rank": rank}, VALUES)


class Ranks:
    """Ranks that are threads of this process."""

    def __init__(self, count: int = RANKS) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=20)
        self.values: list[Any] = [None] * count

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        """Return the `gather` of a rank."""

        def gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        return gather

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Return what `work` returns or raises on each rank."""
        found: list[Any] = [None] * self.count

        def run(rank: int) -> None:
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return found


def save_all(folder: Path | Mapping[int, Path], step: int, seed: int = 0, **more: Any) -> list[Any]:
    """Save on four ranks; `folder`: of all, or of each."""
    ranks = Ranks()

    def work(rank: int) -> StateHashes:
        mine = folder if isinstance(folder, Path) else folder[rank]
        return save.save(mine, snapshot(rank, step, seed), rank, ranks.gather(rank), **more)

    return ranks.run(work)


def names(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def only_error(found: list[Any], kind: type[Exception]) -> str:
    """What all ranks raised alike."""
    assert {type(error) for error in found} == {kind}, found
    (words,) = {str(error) for error in found}
    assert "\n" not in words
    return words
