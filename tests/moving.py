"""One rank of test_zero_checkpoints.py: runs one after the other train, save, and load.

moving.py TASKS OUT     (ranks by the usual variables)

A task is an object: `job`, `strategy`, and either `steps` and `save` (a folder of checkpoints; it
begins anew and saves after each of the named steps) or `loads` (checkpoints; `steps` are made after
each). OUT/results.json has an object for each start: its strategy, the checkpoint, the losses or
the error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hybrid
from hybrid.checkpoint.manifest import read_manifest
from hybrid.job.errors import JobError, RunError
from hybrid.job.variants import resolve
from hybrid.launch.placement import find_placement
from hybrid.launch.process_group import restored_environment
from hybrid.strategies import registry
from hybrid.training.checkpointing import Checkpoints
from hybrid.training.resume import Chosen


class Run:
    """An engine with the batches of its job, and its checkpoints."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.job = hybrid.load_job(task["job"])
        strategy = task["strategy"]
        self.samples, _ = hybrid.build_data(self.job)
        self.engine = hybrid.open_engine(self.job, strategy, *hybrid.build_model(self.job))
        batch, cuts = self.job.train.global_batch, self.job.micro_batches(strategy)
        dp, seed = self.engine.layout.dp, self.job.train.seed
        self.plan = hybrid.BatchPlan(len(self.samples), batch, dp, cuts, seed)
        placement = registry.place(self.job, strategy, find_placement())
        choice = resolve(self.job, strategy)
        self.checkpoints = Checkpoints(self.job, choice, self.engine, placement, None)

    def batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of a step."""
        engine = self.engine
        ids = [i for share in engine.shares for i in self.plan.micro_batch_ids(step, share)]
        return [hybrid.load_micro_batch(self.samples, i, engine.micro_batch_size) for i in ids]

    def train(self, start: int, steps: int) -> list[float]:
        """The losses of some steps."""
        return [self.engine.train_step(self.batches(start + i)).loss for i in range(steps)]

    def load(self, folder: str) -> int:
        """Load a checkpoint, which compares hashes, and return its step."""
        chosen = Chosen(Path(folder), read_manifest(Path(folder)))
        self.checkpoints.chosen = chosen
        self.checkpoints.load(self.batches(chosen.manifest.step))
        return chosen.manifest.step


@restored_environment()  # engines set variables that others refuse
def do(task: dict[str, Any]) -> list[dict[str, Any]]:
    """What one task gives."""
    run, found = Run(task), []
    if "save" in task:
        losses = run.train(0, task["steps"])
        run.checkpoints.out = Path(task["save"])
        run.checkpoints.save(task["steps"], 0, {})
        losses += run.train(task["steps"], task.get("more", 0))
        run.checkpoints.out = Path(task["save"]) / "after"
        run.checkpoints.save(task["steps"] + task.get("more", 0), 0, {})
        found.append({"strategy": task["strategy"], "losses": losses})
    for folder in task.get("loads", []):
        result: dict[str, Any] = {"strategy": task["strategy"], "from": folder}
        try:
            step = run.load(folder)
            result["losses"] = run.train(step, task["steps"])
            result["hash"] = run.checkpoints.newest and run.checkpoints.newest.state_hash
            if "after" in task:
                run.checkpoints.out = Path(task["after"])
                run.checkpoints.save(step + task["steps"], 0, {})
                result["after"] = run.checkpoints.newest and run.checkpoints.newest.state_hash
        except (JobError, RunError) as error:
            result["error"] = str(error)
        found.append(result)
    run.engine.close()
    return found


def main(tasks: str, out: str) -> None:
    """Do the tasks in order."""
    found = [result for task in json.loads(Path(tasks).read_text()) for result in do(task)]
    if find_placement().rank == 0:
        (Path(out) / "results.json").write_text(json.dumps(found))
    hybrid.cleanup()


if __name__ == "__main__":
    main(*sys.argv[1:])
