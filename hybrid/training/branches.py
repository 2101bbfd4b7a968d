"""Finds out whether ranks whose collectives did not match had used different parameters.

A model may take one branch or another by what its micro-batch holds. Engines that share gradients
or parameters then wait for one another in vain, or get what another collective sent. One process
goes through the same micro-batches, with the same weights, and looks which parameters each uses.
No torch until it does."""

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import records
from ..job.errors import Failure, RunFailed
from ..job.file import load_job, to_dict
from ..job.schema import Job
from ..job.variants import resolve
from ..launch.local import run_ranks
from ..records.whole import write_whole
from ..strategies import registry

if TYPE_CHECKING:
    import torch

BRANCHES = ".branches"  # a folder in that of the run
LIMIT_S = 30.0  # a run that failed late is not gone through again to its end
SHOWN = 4  # names of parameters
MEMORY_PART = 0.5  # of the host's free memory, that this may take
# What is said of collectives that did not match, or whose results ranks do not have alike.
MISMATCH = (
    "collective mismatch",
    "match expected size",
    "was ended by SIGABRT",
    "Timed out waiting",
    "closed by peer",
    "finished reduction in the prior iteration",
    "was not reduced over all",
    "collective operation timeout",  # NCCL's watchdog
)
Used = Sequence[frozenset[str]]  # the parameters that each of several micro-batches used
_STEP = re.compile(r"\(in step (\d+)\)")


def explain(failure: Failure, job: Job, strategy: str, nproc: int, out: Path) -> Failure:
    """Return the failure, with the parameters that ranks used differently in front, if they did.

    out: the folder of the run, in which this takes place and leaves nothing."""
    mismatch = failure.kind == "error" and any(words in failure.message for words in MISMATCH)
    if nproc == 1 or not mismatch:
        return failure
    found = ""
    folder = out / BRANCHES
    with _removed(folder), contextlib.suppress(RunFailed):
        asked, answer = folder / "asked.json", folder / "answer"
        step = _STEP.search(failure.message)
        words = {"strategy": strategy, "nproc": nproc, "last": int(step[1]) if step else None}
        records.write({"job": to_dict(job), **words}, asked)
        program, given = (sys.executable, "-m", __name__), [str(asked), str(answer)]
        run_ranks(1, given, folder, program=program, modules=["hybrid.training.branches"])
        found = answer.read_text()
    if not found:
        return failure
    said = f"{found}; so their collectives did not match: {failure.message}"
    return dataclasses.replace(failure, message=said)


@contextlib.contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Remove a folder in the end. One that a killed process leaves goes with the next run."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_branches(job: Job, strategy: str, nproc: int, last: int | None = None) -> str:
    """Say in which step ranks use different parameters, which and on which rank; empty: in none.

    last: the step in which the run failed. Under DDP, which averages gradients after the last
    micro-batch and waits for all of them there, the micro-batches of one rank count too. Imports
    torch, trains in this process as `single` does, and gives up after `LIMIT_S`."""
    choice, begun = resolve(job, strategy), time.monotonic()
    layout, own = registry.get(choice.strategy).layout(choice.job, nproc), ""
    walk = _Walk(job, layout.dp, choice.job.micro_batches(choice.strategy))
    steps = walk.job.train.steps or 0
    for step in range(steps if last is None else min(steps, last + 1)):
        shares_of = list(walk.used(step))
        for k, used in enumerate(shares_of):
            if len(set(used)) > 1:
                ranks = [used[layout.dp_rank(rank)] for rank in range(nproc)]
                return f"ranks used different parameters in step {step}, micro-batch {k}: " + (
                    describe("rank", ranks)
                )
        if choice.strategy == "ddp" and not own:
            own = _within_a_rank(step, shares_of)
        if time.monotonic() - begun > LIMIT_S:
            break
        walk.train(step)
    return own


def _within_a_rank(step: int, shares_of: Sequence[Used]) -> str:
    """Say which micro-batches of one rank used different parameters; empty: none."""
    for rank, used in enumerate(zip(*shares_of, strict=True)):
        if len(set(used)) > 1:
            begin = f"the micro-batches of rank {rank} used different parameters in step {step}: "
            return begin + describe("micro-batch", used)
    return ""


def describe(kind: str, used: Used) -> str:
    """Name the parameters that some used and others did not; kind: what uses them, by number."""
    by_all = frozenset.intersection(*used)
    users: dict[frozenset[str], list[int]] = {}
    for number, mine in enumerate(used):
        users.setdefault(mine, []).append(number)
    plural = f"{kind}es" if kind.endswith("h") else f"{kind}s"
    return "; ".join(
        f"{plural if len(numbers) > 1 else kind} {', '.join(map(str, numbers))}: "
        f"{_names(mine - by_all)}"
        for mine, numbers in users.items()
    )


def _names(names: frozenset[str]) -> str:
    shown, more = sorted(names)[:SHOWN], len(names) - SHOWN
    return (", ".join(shown) or "none of these") + (f" and {more} more" if more > 0 else "")


class _Walk:
    """Goes through a job's steps in one process, with the micro-batches of several ranks."""

    def __init__(self, job: Job, shares: int, micro_batches: int) -> None:
        from ..data import build_data
        from ..data.batches import BatchPlan
        from ..job.schema import resolve_lengths
        from ..launch.placement import Placement
        from ..models import build_model

        self.samples = build_data(job)[0]
        self.job = resolve_lengths(_anywhere(job), len(self.samples))
        layers, self.loss = build_model(job)
        _require_memory(sum(p.numel() for p in layers.names()))
        self.plan = BatchPlan(
            len(self.samples), job.train.global_batch, shares, micro_batches, job.train.seed
        )
        names, here = layers.names(), Placement(device_asked=self.job.launch.device)
        self.engine: Any = registry.open_engine(self.job, "single", layers, self.loss, here)
        self.names = {id(parameter): name for parameter, name in names.items()}
        self.device = here.device

    def used(self, step: int) -> Iterator[Used]:
        """Yield, for each micro-batch of a step, the parameters that each share needs for it."""
        import torch

        from ..engines.state import on_device
        from ..engines.tally import Tally
        from ..models.own_loss import model_input

        self.engine.model.train()
        for group in zip(*self._batches(step), strict=True):
            found: list[frozenset[str]] = []
            for batch in group:
                batch = on_device(batch, self.device)
                with torch.random.fork_rng(devices=[]):
                    output = self.engine.model(model_input(self.loss, batch.input, batch.target))
                    loss = Tally(self.device).add(self.loss, output, batch)
                found.append(self._parameters_of(loss))
            yield found

    def train(self, step: int) -> None:
        """Make one step on the whole batch, as a run does."""
        self.engine.train_step([batch for share in self._batches(step) for batch in share])

    def _batches(self, step: int) -> list[list[Any]]:
        from ..data.loader import load_micro_batch

        shares = range(self.plan.shares)
        ids = [self.plan.micro_batch_ids(step, share) for share in shares]
        return [[load_micro_batch(self.samples, i, None) for i in mine] for mine in ids]

    def _parameters_of(self, loss: "torch.Tensor") -> frozenset[str]:
        """Return the names of the parameters that gradients of a loss would reach."""
        seen, left = set[Any](), [loss.grad_fn]
        found = set[str]()
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (variable := getattr(node, "variable", None)) is not None:
                found.add(self.names.get(id(variable), "a tensor that is no parameter"))
            left += [following for following, _ in node.next_functions]
        return frozenset(found)


def _anywhere(job: Job) -> Job:
    """Return the job for any host: its ranks may have had GPUs that this one lacks."""
    if job.launch.device == "cpu":
        return job
    launch = job.launch.model_copy(update={"device": "auto"})
    return job.model_copy(update={"launch": launch})


def _require_memory(parameters: int) -> None:
    """Raise MemoryError where the model, its gradients and its optimizer would not fit."""
    import psutil

    if 16 * parameters > MEMORY_PART * psutil.virtual_memory().available:
        raise MemoryError


def main() -> None:
    """Answer what the file of the first argument asks, in the file of the second."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    found = find_branches(load_job(asked.pop("job")), **asked)
    write_whole(Path(sys.argv[2]), found)


if __name__ == "__main__":
    main()


def ends_command(error: RunFailed, compared: bool, goes_on: bool) -> bool:
    """Tell whether the command ends with what a rank refused, and prints that as its one line."""
    kind = error.failure.kind
    if not compared:
        return kind in ("job", "unsupported", "room")
    return kind == "room" or (kind == "job" and not goes_on)  # see `hybrid.comparison.runs`
