"""Checkpoints of pipelines move between partitions, strategies and numbers of ranks."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.checkpoint.manifest import read_manifest
from hybrid.checkpoint.pieces import SHARED_FROM, WEIGHT, WRITTEN_ELSEWHERE, Piece, shares_of
from hybrid.job.file import to_dict
from hybrid.launch.local import run_ranks
from hybrid.strategies import registry
from tests.conftest import ROOT, small_job

SAVED, MORE = 2, 2  # steps before and after a checkpoint
JOB: dict[str, Any] = {
    "model": {
        "name": "gpt",
        "options": {
            "num_layers": 5,
            "width": 24,
            "num_heads": 3,
            "context": 16,
            "vocab_size": 101,
            "tied": True,
            "dropout": 0.1,
        },
    },
    "data": {"name": "tests.workloads:sentences", "options": {"vocab_size": 101}},
    "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "no_decay": ["norms"]},
    "schedule": {"name": "cosine", "warmup_steps": 4},
    "train__global_batch": 11,
    "train__micro_batches": 3,
    "train__steps": SAVED + MORE,
    "train__clip_norm": 0.5,
}
BF16 = {"train__precision": "bf16"}
TWO_BY_TWO = {"parallel": {"pp": 2, "dp": 2}}
# The strategy, its ranks, and its settings; `uneven` holds the tied weight on stages 0 and 2.
ROWS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("single", 1, {}),
    "fsdp": ("fsdp", 3, {}),
    "pipeline": ("pipeline", 4, {}),
    "pipeline_3": ("pipeline", 3, {}),
    "uneven": ("pipeline", 4, {"strategy__pipeline": {"partition": [2, 1, 1, 3]}}),
    "2d": ("2d", 4, TWO_BY_TWO | {"strategy__2d": {"zero_stage": 0}}),
    "2d_zero1": ("2d", 4, TWO_BY_TWO),
    "bf16": ("single", 1, BF16),
    "bf16_3": ("pipeline", 3, BF16),
    "bf16_2d": ("2d", 4, TWO_BY_TWO | BF16),
}
# What each launch does in order: a row saves, or a row with a new engine loads what rows saved.
LAUNCHES: list[list[tuple[str, list[str]]]] = [
    [("single", []), ("bf16", [])],
    [
        *[("fsdp", []), ("pipeline_3", []), ("bf16_3", [])],
        *[("pipeline_3", ["pipeline_3", "single", "fsdp"]), ("bf16_3", ["bf16_3", "bf16"])],
    ],
    [
        *[("pipeline", []), ("2d", []), ("2d_zero1", []), ("bf16_2d", [])],
        ("pipeline", ["pipeline", "single", "2d"]),
        ("uneven", ["pipeline", "pipeline_3"]),
        ("2d", ["2d", "fsdp", "2d_zero1"]),
        ("2d_zero1", ["2d_zero1", "single", "pipeline"]),
        ("bf16_2d", ["bf16_2d", "bf16_3"]),
    ],
    [("single", ["pipeline", "2d", "2d_zero1"]), ("bf16", ["bf16_2d"])],
]


class Moves:
    """What all launches gave: the losses of rows after their checkpoints, and what loading gave."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.losses: dict[str, list[float]] = {}
        self.loaded: dict[tuple[str, str], dict[str, Any]] = {}

    def launch(self, number: int, rows: list[tuple[str, list[str]]]) -> None:
        """Do what one launch does, and note it."""
        folder = self.out / str(number)
        folder.mkdir()
        (folder / "tasks.json").write_text(json.dumps([self._task(*row) for row in rows]))
        program = [sys.executable, str(ROOT / "tests" / "moving.py")]
        modules = registry.modules("2d")
        given = [str(folder / "tasks.json"), str(folder)]
        run_ranks(ROWS[rows[0][0]][1], given, folder, program=program, modules=modules)
        found = iter(json.loads((folder / "results.json").read_text()))
        for name, sources in rows:
            for source in sources:
                self.loaded[source, name] = next(found)
            if not sources:
                result = next(found)
                self.losses[name] = result["losses"]
                assert result["unlike"] == [], "what is gathered is what was saved"

    def _task(self, name: str, sources: list[str]) -> dict[str, Any]:
        strategy, _, changes = ROWS[name]
        job = to_dict(small_job(**{**JOB, **changes}))
        task: dict[str, Any] = {"job": job, "strategy": strategy, "steps": SAVED}
        if not sources:
            return task | {"save": str(self.out / name), "more": MORE}
        loads = [str(self.folder(source)) for source in sources]
        return task | {"loads": loads, "after": str(self.out / f"{name}-loaded")}

    def folder(self, name: str, after: bool = False) -> Path:
        """The checkpoint of a row; `after`: the one after all steps."""
        out = self.out / f"{name}-after" if after else self.out / name
        return out / "checkpoints" / f"step-{SAVED + MORE * after:08d}"


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> Moves:
    """All launches, made once."""
    found = Moves(tmp_path_factory.mktemp("moves"))
    for number, rows in enumerate(LAUNCHES):
        found.launch(number, rows)
    return found


def test_every_move_keeps_the_state_and_the_losses(moves: Moves) -> None:
    for (source, name), found in moves.loaded.items():
        assert "error" not in found, (source, name, found)
        bf16 = name.startswith("bf16")
        wanted, bound = (moves.losses["bf16" if bf16 else "single"], 2e-3 if bf16 else 1e-5)
        assert found["losses"] == pytest.approx(wanted, rel=bound), (source, name)
    assert len(moves.loaded) == 22


def test_the_same_layout_goes_on_bit_for_bit(moves: Moves) -> None:
    same = [name for source, name in moves.loaded if source == name]
    assert same == ["pipeline_3", "bf16_3", "pipeline", "2d", "2d_zero1", "bf16_2d"]
    for name in same:
        found, end = moves.loaded[name, name], read_manifest(moves.folder(name, after=True))
        assert found["losses"] == moves.losses[name], name
        assert found["after"] == end.state_hash, name


def test_stages_hold_what_one_process_holds_written_once_by_those_that_hold_it(
    moves: Moves,
) -> None:
    whole = read_manifest(moves.folder("single"))
    for name in ("pipeline", "pipeline_3", "2d", "2d_zero1", "bf16_2d"):
        manifest = read_manifest(moves.folder(name))
        described = {place: entry[:2] for place, entry in manifest.entries.items()}
        assert described == {place: entry[:2] for place, entry in whole.entries.items()}, name
        files = {
            place: {p.file for p in e.pieces if p.size} for place, e in manifest.entries.items()
        }
        first_stage = {"rank00000.safetensors", "rank00001.safetensors"}
        columns = 2 if "2d" in name else 1
        tied = set().union(*(files["0.token.weight", key] for key in ("weight", "exp_avg", "step")))
        assert tied <= set(sorted(first_stage)[:columns]), name
        assert len(set().union(*files.values())) == manifest.values["world_size"], name


def test_bf16_keeps_fp32_masters(moves: Moves) -> None:
    dtypes = {e.dtype for e in read_manifest(moves.folder("bf16_3")).entries.values()}
    assert dtypes == {"F32"}


def pieces_on(rank: int) -> list[Piece]:
    """Small and large tensors that four ranks hold alike, some of which the first stage writes."""
    found = []
    for i, size in enumerate((0, 1, 5, SHARED_FROM - 1, SHARED_FROM, SHARED_FROM + 3)):
        columns = (rank % 2, 2) if rank < 2 else WRITTEN_ELSEWHERE
        for name, copies in (("all", (rank, 4)), ("first", columns)):
            found.append(Piece(f"{name}.{i}", WEIGHT, (size,), torch.zeros(size), 0, copies))
    return found


def test_what_several_stages_hold_is_written_once_by_the_first() -> None:
    shares = [(rank, share) for rank in range(4) for share in shares_of(pieces_on(rank))]
    elements = Counter[tuple[str, int]]()
    for _, share in shares:
        elements.update(
            (share.piece.name, i) for i in range(share.start, share.start + share.count)
        )
    assert set(elements.values()) == {1}
    assert len(elements) == 2 * sum(len(piece.tensor) for piece in pieces_on(0)[::2])
    assert {rank for rank, share in shares if share.piece.name.startswith("first")} == {0, 1}
