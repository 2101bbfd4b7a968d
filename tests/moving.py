"""One rank of test_zero_checkpoints.py: runs one after the other train, save, and load.

moving.py TASKS OUT     (ranks by the usual variables)

A task is an object: `job`, `strategy`, and either `save` (a run's folder: it begins anew, saves
after `steps`, and, in the folder with `-after` in its name, after `more`) or `loads` (checkpoints:
`steps` are made after each; it saves then in the folder `after`). OUT/results.json has an object
for each start: the strategy, the checkpoint, the losses or the error, the hashes, and `unlike`: the
weights saved that are not those gathered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hybrid
from hybrid.checkpoint.folders import folder_of
from hybrid.checkpoint.load import Reader
from hybrid.checkpoint.manifest import read_manifest
from hybrid.job.errors import JobError, RunError
from hybrid.job.variants import resolve
from hybrid.launch.environment import restored_environment
from hybrid.launch.placement import find_placement
from hybrid.strategies import registry
from hybrid.training.checkpointing import Checkpoints
from hybrid.training.resume import Chosen


class Run:
    """An engine with the batches of its job, and its checkpoints."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.job = hybrid.load_job(task["job"])
        strategy = task["strategy"]
        self.samples, _ = hybrid.build_data(self.job)
        layers, loss = hybrid.build_model(self.job)
        for parameter in layers.names():
            if "save" in task and not parameter.requires_grad:
                parameter.data.mul_(1.3)  # so that what loads has to take it over
        self.engine = hybrid.open_engine(self.job, strategy, layers, loss)
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

    def save(self, folder: str, step: int) -> str:
        """Go on to a step if there is none, save there, and return the hash of the state."""
        if self.engine.step == 0:
            self.train(0, step)
        self.checkpoints.out = Path(folder)
        self.checkpoints.save(step, 0, {}, False)
        assert self.checkpoints.newest
        return self.checkpoints.newest.state_hash

    def unlike(self) -> list[str]:
        """Which weights of the newest checkpoint are not those that the engine gathers."""
        whole, newest = self.engine.state(), self.checkpoints.newest
        assert newest and self.checkpoints.out
        folder = folder_of(self.checkpoints.out / "checkpoints", newest.step)
        reader = Reader(folder, read_manifest(folder))
        found = [n for n, t in whole.items() if not t.equal(reader.whole(n, "weight"))]
        reader.close()
        return found

    def load(self, folder: str) -> int:
        """Load a checkpoint, which compares hashes, and return its step."""
        chosen = Chosen(Path(folder), read_manifest(Path(folder)))
        self.checkpoints.chosen = chosen
        self.checkpoints.load(self.batches(chosen.manifest.step))
        return chosen.manifest.step


@restored_environment()  # engines set variables that others refuse
def do(task: dict[str, Any]) -> list[dict[str, Any]]:
    """What one task gives."""
    run, found, steps = Run(task), [], task["steps"]
    if "save" in task:
        result = {"strategy": task["strategy"], "hash": run.save(task["save"], steps)}
        result["unlike"] = run.unlike()
        result["losses"] = run.train(steps, task["more"])
        result["after"] = run.save(task["save"] + "-after", steps + task["more"])
        found.append(result)
    for folder in task.get("loads", []):
        result = {"strategy": task["strategy"], "from": folder}
        try:
            step = run.load(folder)
            result["losses"] = run.train(step, steps)
            if "after" in task:
                result["after"] = run.save(task["after"], step + steps)
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
