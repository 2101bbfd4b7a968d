"""Checkpoints of pipelines move between partitions, strategies and numbers of ranks."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hybrid.checkpoint.manifest import read_manifest
from hybrid.checkpoint.pieces import SHARED_FROM, WEIGHT, WRITTEN_ELSEWHERE, Piece, shares_of
from hybrid.engines.deepspeed_setup import restore_fp32_masters
from hybrid.engines.deepspeed_state import UnroundedPiece, read_loss_scale, set_loss_scale
from hybrid.engines.optimizer import LossScale
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
    """What all launches gave: losses of each row, hashes of its states, and what loading gave."""

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
        modules = registry.modules("2d") if number else ()
        given = [str(folder / "tasks.json"), str(folder)]
        run_ranks(ROWS[rows[0][0]][1], given, folder, program=program, modules=modules)
        found = iter(json.loads((folder / "results.json").read_text()))
        for name, sources in rows:
            for source in sources:
                self.loaded[source, name] = next(found)
            if not sources:
                self.losses[name] = next(found)["losses"]

    def _task(self, name: str, sources: list[str]) -> dict[str, Any]:
        strategy, _, changes = ROWS[name]
        job = to_dict(small_job(**{**JOB, **changes}))
        task: dict[str, Any] = {"job": job, "strategy": strategy, "steps": SAVED}
        if not sources:
            return task | {"save": str(self.out / name), "more": MORE}
        loads = [str(self.folder(source)) for source in sources]
        return task | {"loads": loads, "after": str(self.out / f"{name}_loaded")}

    def folder(self, name: str, after: bool = False) -> Path:
        """The checkpoint of a row; `after`: the one after all steps."""
        out = self.out / name / "after" if after else self.out / name
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
        assert found["losses"] == pytest.approx(wanted[SAVED:], rel=bound), (source, name)
    assert len(moves.loaded) == 21


def test_the_same_layout_goes_on_bit_for_bit(moves: Moves) -> None:
    same = [name for source, name in moves.loaded if source == name]
    assert same == ["pipeline_3", "bf16_3", "pipeline", "2d", "2d_zero1", "bf16_2d"]
    for name in same:
        found, end = moves.loaded[name, name], read_manifest(moves.folder(name, after=True))
        assert found["losses"] == moves.losses[name][SAVED:], name
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


def pieces_on(rank: int, draw: random.Random) -> list[Piece]:
    """Small and large tensors that four ranks hold alike, among others that a rank has alone."""
    found = [Piece(f"own{rank}.{i}", WEIGHT, (3,), torch.zeros(3)) for i in range(rank)]
    for i, size in enumerate((0, 1, 5, SHARED_FROM - 1, SHARED_FROM, SHARED_FROM + 3)):
        found.append(Piece(f"all.{i}", WEIGHT, (size,), torch.zeros(size), 0, (rank, 4)))
    copies = (0, 1) if rank == 0 else WRITTEN_ELSEWHERE
    found.append(Piece("first", WEIGHT, (SHARED_FROM,), torch.zeros(SHARED_FROM), 0, copies))
    draw.shuffle(found)
    return found


def test_ranks_with_unlike_pieces_write_each_element_once() -> None:
    draw = random.Random(0)
    shares = [share for rank in range(4) for share in shares_of(pieces_on(rank, draw))]
    ranges: dict[str, list[tuple[int, int]]] = {}
    for share in shares:
        ranges.setdefault(share.piece.name, []).append((share.start, share.start + share.count))
    assert len(ranges) == 6 + 7
    for name, found in ranges.items():
        ends = [0, *itertools.chain(*sorted(found))]
        size = next(s.piece.shape[0] for s in shares if s.piece.name == name)
        assert ends[0::2] == [*ends[1::2][:1], *ends[2::2]] and ends[-1] == size, name
    writers = {s.piece.name for s in shares_of(pieces_on(3, draw))}
    assert "first" not in writers


def make_scaler() -> Any:
    """DeepSpeed's, which doubles after five good steps."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    return DynamicLossScaler(
        2.0**16, scale_window=5, raise_error_at_min_scale=False, dtype=torch.float16
    )


@pytest.mark.parametrize("seed", range(3))
def test_deepspeeds_loss_scale_goes_on_from_any_step(seed: int) -> None:
    draw = random.Random(seed)
    overflows = [draw.random() < 0.06 for _ in range(60)]
    whole, scales = make_scaler(), list[float]()
    states = []
    for overflow in overflows:
        states.append(read_loss_scale(whole))
        scales.append(whole.cur_scale)
        whole.update_scale(overflow)
    assert len(set(scales)) > 3 and any(state["good_steps"] == 5 for state in states)
    for start, state in enumerate(states):
        other = make_scaler()
        set_loss_scale(other, state)
        for step in range(start, len(overflows)):
            assert other.cur_scale == scales[step], (start, step)
            other.update_scale(overflows[step])


def test_torchs_loss_scale_goes_on_where_deepspeed_was_about_to_double_it() -> None:
    scale = LossScale(small_job(train__precision="fp16"), torch.device("cpu"))
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], 0.1)
    scale.set_state({"scale": 2.0**10, "good_steps": 2000})
    assert scale.read_state() == {"scale": 2.0**10, "good_steps": 1999}
    scale.scale(parameter.sum()).backward()
    scale.step(optimizer)
    assert scale.read_state() == {"scale": 2.0**11, "good_steps": 0}


def test_a_frozen_parameter_is_saved_as_it_was_before_it_was_rounded() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    value = model.weight.detach().clone()
    restore_fp32_masters(model, "bf16")
    model.weight.data = model.weight.data.bfloat16()
    whole: Any = model.weight
    piece = UnroundedPiece("w", WEIGHT, (2, 3), whole.unrounded, 0, (0, 1), whole)
    assert torch.equal(piece.read(0, 6).view(2, 3), value)
    piece.write(2, torch.tensor([1.001, 2.002]))
    assert piece.read(2, 2).tolist() == pytest.approx([1.001, 2.002], rel=1e-7)
    assert model.weight.flatten()[2:4].tolist() == [1.0, 2.0]
    assert torch.equal(model.weight.flatten()[4:], value.flatten()[4:].bfloat16())
