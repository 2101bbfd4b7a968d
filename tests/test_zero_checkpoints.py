"""The state under ZeRO-1, 2 and 3: saved and loaded piece by piece, it goes on under any strategy.

A tied GPT of odd sizes, with warm-up, clipping and micro-batches; and a small model with frozen,
tiny and tied parameters, in bf16.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from hybrid import records
from hybrid.checkpoint.load import Reader
from hybrid.checkpoint.manifest import read_manifest
from hybrid.job.file import to_dict
from hybrid.launch.local import run_ranks
from hybrid.strategies import registry
from tests.conftest import ROOT, small_job
from tests.moving import do

MOVING = ROOT / "tests" / "moving.py"
Results = dict[tuple[str, str], dict[str, Any]]  # by the strategy, and that of the checkpoint
STEP, MORE = 3, 2
ADAMW = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "no_decay": ["norms", "biases"]}
TIED: dict[str, Any] = {"num_layers": 5, "width": 24, "num_heads": 3, "context": 16, "tied": True}
GPT = {
    "model": {"name": "gpt", "options": TIED | {"vocab_size": 101}},
    "data": {"name": "tests.workloads:sentences", "options": {"vocab_size": 101}},
    "optimizer": ADAMW,
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "train": {"global_batch": 14, "micro_batches": 2, "steps": 12, "clip_norm": 0.5},
}
FROZEN = {
    "model": {"name": "tests.workloads:partly_frozen"},
    "data": {"name": "tests.workloads:points"},
    "train__precision": "bf16",
}


class Place:
    """A folder with a job, whose strategies save and load in one launch."""

    def __init__(self, folder: Path, job: hybrid.Job) -> None:
        self.folder, self.job = folder, folder / "job.json"
        records.write(to_dict(job), self.job)

    def checkpoint(self, strategy: str) -> Path:
        """The checkpoint that a strategy saved."""
        return self.folder / strategy / "checkpoints" / f"step-{STEP:08d}"

    def save(self, strategy: str) -> dict[str, Any]:
        """The task to save after STEP steps, and again after MORE."""
        folder = str(self.folder / strategy)
        asked = {"strategy": strategy, "steps": STEP, "more": MORE, "save": folder}
        return asked | {"job": str(self.job)}

    def load(self, strategy: str, *saved: str, after: bool = False) -> dict[str, Any]:
        """The task to load what other strategies saved, and to make MORE steps."""
        loads = [str(self.checkpoint(name)) for name in saved]
        asked = {"strategy": strategy, "steps": MORE, "loads": loads, "job": str(self.job)}
        return asked | ({"after": str(self.folder / f"{strategy}-resumed")} if after else {})

    def run(self, nproc: int, *tasks: dict[str, Any]) -> Results:
        """What the tasks give in one launch of some ranks."""
        if nproc == 1:
            results = [result for task in tasks for result in do(task)]
        else:
            out = self.folder / f"ranks{nproc}"
            out.mkdir()
            records.write(list(tasks), out / "tasks.json")
            words, program = [str(out / "tasks.json"), str(out)], [sys.executable, str(MOVING)]
            modules = sorted({m for task in tasks for m in registry.modules(task["strategy"])})
            run_ranks(nproc, words, out, program=program, modules=modules)
            results = json.loads((out / "results.json").read_text())
        return {(r["strategy"], Path(r.get("from", "-/-/-")).parts[-3]): r for r in results}


ZERO = ("zero1", "zero2", "zero3")
ALL = ("single", *ZERO, "fsdp")


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Results]:
    """Strategies of three ranks and one, and what came of them."""
    place = Place(tmp_path_factory.mktemp("gpt"), small_job(**GPT))
    found = place.run(1, place.save("single"))
    again = [place.load(name, name, after=True) for name in ZERO]
    return place, found | place.run(3, *map(place.save, (*ZERO, "fsdp")), *again)


def bytes_of(folder: Path) -> dict[tuple[str, str], bytes]:
    """The whole tensors of a checkpoint."""
    reader = Reader(folder, read_manifest(folder))
    found = {entry: reader.whole(*entry).numpy().tobytes() for entry in reader.manifest.entries}
    reader.close()
    return found


@pytest.mark.parametrize("name", ZERO)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    name: str, gpt: tuple[Place, Results]
) -> None:
    _, results = gpt
    assert results[name, name].get("error") is None and results[name, "-"]["unlike"] == []
    assert results[name, name]["losses"] == results[name, "-"]["losses"]
    assert results[name, name]["after"] == results[name, "-"]["after"]
    assert results[name, "-"]["after"] != results[name, "-"]["hash"]


@pytest.mark.parametrize("name", ZERO)
def test_every_tensor_stands_as_one_process_saves_it(name: str, gpt: tuple[Place, Results]) -> None:
    place, _ = gpt
    wanted = read_manifest(place.checkpoint("single")).entries
    got = read_manifest(place.checkpoint(name)).entries
    assert got.keys() == wanted.keys() and len({key for _, key in got}) == 4
    for entry in wanted:
        assert got[entry][:2] == wanted[entry][:2], entry
        assert all(piece.size for piece in got[entry].pieces), entry
    cut = [e for (_, key), e in got.items() if key == "exp_avg" and len(e.pieces) > 1]
    assert len(cut) == 58 if name == "zero3" else 2 <= len(cut) <= 4, "borders of two groups"
    steps = {b for (_, key), b in bytes_of(place.checkpoint(name)).items() if key == "step"}
    assert steps == {torch.tensor(float(STEP)).numpy().tobytes()}


def test_checkpoints_move_between_strategies_and_world_sizes(gpt: tuple[Place, Results]) -> None:
    """That the hashes are equal after loading is for `Checkpoints.load` to see."""
    place, saved = gpt
    all_of = {"zero1": ALL, "zero3": ALL, "fsdp": ZERO, "zero2": ("single", "zero3")}
    tasks = [place.load(name, *sources) for name, sources in all_of.items()]
    found = place.run(2, *tasks)
    found |= place.run(1, place.load("single", *ZERO, "fsdp"))
    assert len(found) == 2 * len(ALL) + 3 + 2 + 4
    assert {pair: r["error"] for pair, r in found.items() if "error" in r} == {}
    for (strategy, source), result in found.items():
        wanted = pytest.approx(saved[source, "-"]["losses"], rel=1e-5)
        assert result["losses"] == wanted, (strategy, source)


def test_bf16_saves_masters_and_what_frozen_parameters_were(tmp_path: Path) -> None:
    robin = tmp_path / "robin.json"
    robin.write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}')
    settings: dict[str, Any] = {"strategy__zero2": {"ds_config": str(robin)}}
    job = small_job(**FROZEN, optimizer=ADAMW, train__clip_norm=0.5, **settings)
    place = Place(tmp_path, job)
    found = place.run(1, place.save("single"))
    tasks = [*map(place.save, ZERO), place.load("zero1", "zero3", "zero2")]
    tasks += [place.load("zero3", "zero1", "single"), place.load("zero1", "zero1", after=True)]
    new = tmp_path / "new" / "checkpoints" / "step-00000000"
    tasks = [place.save("zero1") | {"steps": 0, "save": str(new.parents[1])}, *tasks]
    tasks += [place.load("zero3") | {"loads": [str(new)]}]
    found |= place.run(3, *tasks)
    assert {key for _, key in read_manifest(new).entries} == {"weight"}, "no step was made"
    moved = place.run(1, place.load("single", *ZERO))
    errors = {pair: r["error"] for pair, r in (found | moved).items() if "error" in r}
    assert errors == {}
    assert [r["unlike"] for r in found.values() if "unlike" in r] == [[]] * 4
    assert found["zero1", "zero1"]["after"] == found["zero1", "-"]["after"]
    for (strategy, source), result in (found | moved).items():
        wanted = pytest.approx(found.get((source, "-"), result)["losses"], rel=1e-4)
        assert result["losses"] == wanted, (strategy, source)
    exact, got = (bytes_of(place.checkpoint(name)) for name in ("single", "zero3"))
    frozen = [n for n, key in got if n.endswith("shift")]
    assert len(frozen) == 2 and all(got[n, "weight"] == exact[n, "weight"] for n in frozen)
    assert {e.dtype for e in read_manifest(place.checkpoint("zero1")).entries.values()} == {"F32"}
