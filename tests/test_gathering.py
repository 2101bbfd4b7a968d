"""Whole weights come to rank 0 a buffer at a time. Four ranks are threads of this process."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybrid.checkpoint import gathering, tensors
from hybrid.checkpoint.gathering import WholeWeights, gather_whole
from hybrid.checkpoint.pieces import WEIGHT, WRITTEN_ELSEWHERE, Piece
from hybrid.checkpoint.weights import save_weights

RANKS, BUFFER = 4, 64  # bytes: sixteen fp32 numbers
SHAPES = {"odd": (7, 13), "long": (331,), "number": (), "empty": (0, 3), "row": (1, 16)}


class Threads:
    """What `gathering` uses of torch.distributed, between threads; it counts what is held."""

    def __init__(self) -> None:
        self.ranks = threading.local()
        self.meeting = threading.Barrier(RANKS, timeout=20)
        self.told: list[Any] = [None] * RANKS
        self.sent = [Queue[torch.Tensor](1) for _ in range(RANKS)]
        self.largest = 0

    def gather_objects(self, value: Any) -> list[Any]:
        self.told[self.ranks.mine] = value
        self.meeting.wait()
        found = list(self.told)
        self.meeting.wait()
        return found

    def is_initialized(self) -> bool:
        return True

    def get_rank(self) -> int:
        return int(self.ranks.mine)

    def send(self, raw: torch.Tensor, to: int) -> None:
        assert to == 0 and raw.dtype == torch.uint8
        self.largest = max(self.largest, raw.numel())
        self.sent[self.ranks.mine].put(raw.clone(), timeout=20)

    def recv(self, raw: torch.Tensor, owner: int) -> None:
        raw.copy_(self.sent[owner].get(timeout=20))  # refuses another size


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    found = Threads()
    monkeypatch.setattr(gathering, "dist", found)
    monkeypatch.setattr(gathering, "gather_objects", found.gather_objects)
    monkeypatch.setattr(gathering, "group_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gathering, "BUFFER_BYTES", BUFFER)
    monkeypatch.setattr(tensors, "BUFFER_BYTES", BUFFER)
    return found


def pieces_of_rank(whole: dict[str, torch.Tensor], rank: int, seed: int) -> list[Piece]:
    """Each tensor cut over the ranks at places that the seed draws, or whole on some of them."""
    draw, found = random.Random(seed), []
    for name, tensor in whole.items():
        kind, flat = draw.choice(["cut", "copies", "one"]), tensor.reshape(-1)
        cuts = sorted(draw.choices(range(len(flat) + 1), k=RANKS - 1))
        owner = draw.randrange(RANKS)
        if kind == "cut":
            begin, end = ([0, *cuts, len(flat)][i] for i in (rank, rank + 1))
            found.append(Piece(name, WEIGHT, tensor.shape, flat[begin:end], begin))
        elif kind == "copies":
            found.append(Piece(name, WEIGHT, tensor.shape, tensor, 0, (rank, RANKS)))
        else:
            held = (0, 1) if rank == owner else WRITTEN_ELSEWHERE
            found.append(Piece(name, WEIGHT, tensor.shape, tensor, 0, held))
    return found


@pytest.mark.parametrize("seed", range(6))
def test_ranks_send_what_they_hold(seed: int, threads: Threads, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    whole |= {"count": torch.tensor([3, 5]), "half": torch.randn(97).bfloat16()}
    names = {**dict(zip(whole, whole, strict=True)), "tied": "odd"}  # stands twice in the file

    def work(rank: int) -> dict[str, torch.Tensor]:
        threads.ranks.mine = rank
        pieces = pieces_of_rank(whole, rank, seed)
        weights = WholeWeights(pieces)
        if rank:
            weights.send(names.values())
        else:
            parts = [weights.part(key, name) for key, name in names.items()]
            save_weights(parts, tmp_path, {})
        return gather_whole(pieces)

    with ThreadPoolExecutor(RANKS) as pool:
        states = list(pool.map(work, range(RANKS)))
    assert list(states[0]) == list(whole) and states[1:] == [{}] * (RANKS - 1)
    back = load_file(tmp_path / "model.safetensors")
    assert back.keys() == names.keys() and threads.largest <= BUFFER
    for key, name in names.items():
        for got in (states[0][name], back[key]):
            assert got.dtype == whole[name].dtype and torch.equal(got, whole[name]), key
