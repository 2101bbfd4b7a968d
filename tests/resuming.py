"""Trains, saves and goes on in one group of ranks, for many cases at once.

    resuming.py CASES OUT     (ranks by the usual variables)

CASES is a JSON list of `Case`s. OUT/result.json gets what `run_case` returns, by their names, and
OUT/NAME has the checkpoints."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, TypedDict

import torch

import hybrid
from hybrid.checkpoint.folders import folder_of, verify
from hybrid.checkpoint.state_hash import hash_of_pieces
from hybrid.data.batches import BatchPlan
from hybrid.engines import optimizer
from hybrid.engines.protocol import Engine
from hybrid.job.errors import JobError
from hybrid.job.variants import resolve
from hybrid.launch.environment import restored_environment
from hybrid.launch.exchange import gather_objects
from hybrid.launch.placement import find_placement
from hybrid.launch.process_group import join_process_group
from hybrid.models import build_model
from hybrid.strategies.registry import open_engine, place
from hybrid.training.checkpointing import Checkpoints
from hybrid.training.evaluation import make_loader
from hybrid.training.resume import Chosen
from tests.conftest import SMALL

CHECKPOINTS = "checkpoints"


class Case(TypedDict, total=False):
    """One strategy that trains `steps` steps and saves after some, and runs that go on from there.

    job: overrides of the small job, by dotted key. goes_on: each has `at`, and may have another
    `strategy` or `job`, or be `unrehearsed`. growth: of fp16's scale, in steps."""

    name: str
    strategy: str
    job: dict[str, Any]
    saves: list[int]
    goes_on: list[dict[str, Any]]
    growth: int


def run_case(case: Case, out: Path) -> dict[str, Any]:
    """What the run without a stop came to, and the runs that went on (see `_Run.ended`), or the
    error for which all ranks refused."""
    growth = optimizer.GROWTH_STEPS
    optimizer.GROWTH_STEPS = case.get("growth", growth)
    try:
        job, saves = case.get("job", {}), case.get("saves", [])
        with restored_environment():
            whole = _Run(case["strategy"], job, out / case["name"]).train(0, saves)
        found: dict[str, Any] = {"whole": whole, "goes_on": []}
        for one in case.get("goes_on", []):
            strategy = one.get("strategy", case["strategy"])
            with restored_environment():
                run = _Run(strategy, job | one.get("job", {}), out / case["name"])
                if one.get("unrehearsed"):
                    run.engine.rehearse = lambda _: None  # type: ignore[method-assign]
                found["goes_on"].append(run.train(one["at"], []))
        return found
    except JobError as error:
        return {"error": str(error)}
    finally:
        optimizer.GROWTH_STEPS = growth


class _Run:
    """One engine, its data, and where it saves."""

    def __init__(self, strategy: str, changes: dict[str, Any], out: Path) -> None:
        self.job = hybrid.load_job(SMALL, changes)
        self.choice, self.out = resolve(self.job, strategy), out
        self.placement = place(self.job, strategy, find_placement())
        self.samples = hybrid.build_data(self.job)[0]
        self.engine: Engine = open_engine(
            self.job, strategy, *build_model(self.job), self.placement
        )
        cuts = self.job.micro_batches(strategy)
        sizes = self.job.train.global_batch, self.engine.layout.dp, cuts, self.job.train.seed
        self.plan = BatchPlan(len(self.samples), *sizes)

    def train(self, start: int, saves: list[int]) -> dict[str, Any]:
        """Go on after `start` steps, save, and tell how it ended."""
        steps = range(start, self.job.train.steps or 0)
        loader = make_loader(self.job, self.plan, self.engine, self.samples, steps)
        chosen, results = None, []
        if start:
            folder = folder_of(self.out / CHECKPOINTS, start)
            manifest, problems = verify(folder, whole=True)
            assert not problems, problems
            chosen = Chosen(folder, manifest)
        kept = Checkpoints(self.job, self.choice, self.engine, self.placement, self.out, chosen)
        if start:
            first = min(start, (self.job.train.steps or 0) - 1)
            ahead = range(first, first + 1)
            batches = make_loader(self.job, self.plan, self.engine, self.samples, ahead)
            kept.load(batches.step(first))
        for step in steps:
            self.engine.start_step(loader.step(step))
            if step + 1 in saves:
                results += self.engine.results()
                kept.save(step + 1, 0, {}, False)
        results += self.engine.results()
        return self.ended(results)

    def ended(self, results: list[Any]) -> dict[str, Any]:
        """The losses of the steps, the loss scales, digests of the state at the end."""
        own = self.engine.own_state()
        digest = hashlib.sha256()
        for name, tensor in sorted(own.tensors.items()):
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode() + flat.numpy().tobytes())
        numbers = json.dumps(own.numbers, sort_keys=True)
        found = {
            "losses": [result.loss for result in results],
            "scales": [result.loss_scale for result in results],
            "skipped": [result.skipped for result in results],
            "hash": hash_of_pieces(self.engine.pieces()),
            "own": gather_objects([digest.hexdigest(), numbers]),
            "numbers": self.engine.optimizer_numbers(),
            "scale": self.engine.loss_scale_state(),
            "notes": self.engine.notes,
        }
        self.engine.close()
        return found


def main(cases: str, out: str) -> None:
    """Run the cases on this rank."""
    found = {}
    join_process_group(find_placement())
    for case in json.loads(Path(cases).read_text()):
        found[case["name"]] = run_case(case, Path(out))
        if find_placement().rank == 0:
            (Path(out) / "result.json").write_text(json.dumps(found))
    hybrid.cleanup()


if __name__ == "__main__":
    main(*sys.argv[1:])
