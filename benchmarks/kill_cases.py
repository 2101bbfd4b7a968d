"""Draws what befalls a run, lets it happen, has the run go on, and says whether anything was lost.

Each case is drawn by its number. Its run is held against one of the same job and strategy that
nothing befalls: every checkpoint by its state hash, the end by its weights, losses and evaluations.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import shutil
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hybrid
from hybrid.checkpoint.folders import list_checkpoints, step_of, verify
from hybrid.checkpoint.tensor_file import sha256_of
from hybrid.job.errors import RunFailed, Stopped
from hybrid.job.schema import Job
from hybrid.job.variants import resolve
from hybrid.records import Record
from hybrid.training.check import check_job
from hybrid.training.progress import Watcher
from hybrid.training.resume import choose
from hybrid.training.run import launch
from tests.accidents import Accident
from tests.test_failures import ranks_of

Row = dict[str, Any]
STEPS, EVERY, KEEP, EVAL_EVERY = 12, 3, 2, 4
PHASES = ("loading", "step", "evaluation", "saving")
# The calls of a save by rank 0 from its second save on, in order: before and after each.
CHANNELS = [*(("mkfifo", n) for n in range(3)), *(("unpipe", n) for n in range(6))]
WRITING = [("mkdir", 0), *CHANNELS, *(("block", n) for n in range(40)), ("fdatasync", 0)]
COMMITTING = [("manifest", 0), ("fsync", 0), ("fsync", 1), ("rename", 0), ("fsync", 2)]
PRUNING = [("rename", 1), *(("unlink", n) for n in range(5)), ("rmdir", 0)]
REPLACING = [("rename", 0), ("rename", 1), ("fsync", 2), ("unlink", 1), ("rmdir", 0)]
INSTANTS = {
    "writing": WRITING, "commit": COMMITTING, "pruning": PRUNING, "replacing": REPLACING
}  # fmt: skip
SECTIONS: dict[str, Any] = {
    "model": {
        "name": "gpt",
        "options": {
            "num_layers": 4, "width": 24, "num_heads": 3, "context": 32, "vocab_size": 101,
            "dropout": 0.1, "tied": True,
        },
    },
    "data": {"name": "benchmarks.soak:tokens"},
    "optimizer": {"name": "adamw", "lr": 0.003},
    "schedule": {"name": "cosine", "warmup_steps": 2},
    "train": {"global_batch": 10, "micro_batches": 2, "clip_norm": 1.0, "eval_every": EVAL_EVERY},
    "launch": {"collective_timeout_s": 60},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """Is one run and what befalls it. kind: a phase, or one of INSTANTS."""

    number: int
    kind: str
    strategy: str
    asynchronous: bool
    accident: Accident

    def words(self) -> str:
        """Describe it in one line."""
        a = self.accident
        when = f", {'after' if a.after else 'before'} {a.call} {a.nth}" if a.call else ""
        beside = "asynchronous " if self.asynchronous else ""
        return f"{beside}{self.strategy}, rank {a.rank}, {self.kind} {a.at}{when}"


def num_ranks(strategy: str) -> int:
    """Return the ranks of a run."""
    return 1 if strategy == "single" else 4


@functools.cache
def job_of(strategy: str, asynchronous: bool, steps: int = STEPS) -> Job:
    """Return the job of a strategy's runs, checked."""
    more: dict[str, Any] = {"train.steps": steps, "checkpoint.every": EVERY}
    more |= {"checkpoint.keep": KEEP, "checkpoint.async": asynchronous}
    if strategy == "2d":
        more |= {"parallel.pp": 2, "parallel.dp": 2}
    if strategy == "local_sgd":  # which can be evaluated after a merge alone
        more |= {"strategy.local_sgd.sync_every": EVAL_EVERY}
    return check_job(hybrid.load_job(SECTIONS, more)).job


class Reference:
    """Holds a run that nothing befalls: the hash of each of its checkpoints, and its end."""

    def __init__(self, strategy: str, folder: Path, steps: int = STEPS, every: int = EVERY) -> None:
        out = folder / f"{strategy}-{steps}"
        job = job_of(strategy, False, steps)
        asked = job.checkpoint.model_copy(update={"keep": None, "every": every})
        job = job.model_copy(update={"checkpoint": asked})
        self.record = launch(job, strategy, num_ranks(strategy), out, Watcher())
        self.hashes = {step: found for step, (found, _) in committed(out).items()}
        self.weights = weights_of(out)
        shutil.rmtree(out)


def committed(out: Path) -> dict[int, tuple[str, list[str]]]:
    """Return the state hash of each committed checkpoint, and what is wrong with it."""
    found = {}
    for path in list_checkpoints(out / "checkpoints"):
        manifest, problems = verify(path, whole=True)
        found[step_of(path)] = (manifest.state_hash if manifest else "", problems)
    return found


def weights_of(out: Path) -> str:
    """Return the SHA-256 of the final weights."""
    return sha256_of(out / "checkpoints" / "final" / "model.safetensors")


def cells(strategies: list[str]) -> list[tuple[str, int, str]]:
    """Return every strategy x rank x phase, in a fixed order without a pattern."""
    found = [(s, r, p) for s in strategies for r in range(num_ranks(s)) for p in PHASES]
    random.Random(0).shuffle(found)
    return found


def draw_phase(number: int, strategies: list[str]) -> Case:
    """Return the case of a number: a rank is killed in a phase."""
    draw, there = random.Random(number), cells(strategies)
    strategy, rank, phase = there[number % len(there)]
    at = {"loading": 40, "step": STEPS, "evaluation": STEPS // EVAL_EVERY, "saving": 4}[phase]
    accident = Accident(rank, phase, draw.randrange(at))
    if phase == "saving":
        call, nth = draw.choice([one for one in WRITING if one[0] == "block"][:20])
        accident = dataclasses.replace(accident, call=call, nth=nth)
    return Case(number, phase, strategy, draw.random() < 0.5, accident)


def draw_instant(number: int, strategies: list[str]) -> Case:
    """Return the case of a number: a rank is killed at an instant of a save."""
    draw = random.Random(10_000 + number)
    kind = list(INSTANTS)[number % len(INSTANTS)]
    call, nth = draw.choice(INSTANTS[kind])
    strategy = draw.choice(strategies)
    only_0 = kind != "writing" or (call, nth) in {("mkdir", 0), *CHANNELS}
    rank = 0 if only_0 else draw.randrange(num_ranks(strategy))
    first = {"writing": 0, "commit": 1, "pruning": 2, "replacing": 0}[kind]
    at = 0 if kind == "replacing" else draw.randrange(first, 4)
    accident = Accident(rank, "saving", at, call, nth, draw.random() < 0.5)
    return Case(number, kind, strategy, draw.random() < 0.5, accident)


def run_case(case: Case, reference: Reference, out: Path) -> Row:
    """Let a case happen, have the run go on, and return what was found."""
    shutil.rmtree(out, ignore_errors=True)
    began, job = time.monotonic(), job_of(case.strategy, case.asynchronous)
    run = functools.partial(launch, job, case.strategy, num_ranks(case.strategy), out, Watcher())
    resume = None
    if case.accident.phase == "loading":
        at_7 = Accident(case.number % num_ranks(case.strategy), "step", 7)
        ended(lambda: run(program=at_7.program()))
        resume = chosen(out, job, case.strategy)
    elif case.kind == "replacing":
        run()
        resume = out / "checkpoints" / f"step-{STEPS - EVERY:08d}"
    reason = ended(lambda: run(program=case.accident.program(), resume=resume))
    row = {"number": case.number, "kind": case.kind, "what": case.words(), "reached": bool(reason)}
    problems = after_death(out, reference)
    if reason and "SIGKILL" not in reason:
        problems.append(f"another end: {reason}")
    before, lines = committed(out), count_lines(out)
    start = chosen(out, job, case.strategy)
    found = run(resume=start)
    row |= {"made": lines, "went_on_from": step_of(start) if start else 0}
    lost = lines - row["went_on_from"]
    # One that is written beside the training may be a whole interval behind.
    if case.kind != "replacing" and lost > EVERY * (1 + case.asynchronous):
        problems.append(f"{lost} steps were lost")
    if (step_of(start) if start else 0) < max(before, default=0):
        problems.append(f"went on from {start.name}, not the newest")
    problems += at_end(out, reference, found)
    return row | {"lost": lost, "problems": problems, "seconds": time.monotonic() - began}


def chosen(out: Path, job: Job, strategy: str) -> Path | None:
    """Return the checkpoint that `--resume auto` chooses."""
    found = choose(out, "auto", resolve(job, strategy))
    return found.folder if found else None


def ended(run: Any) -> str:
    """Return why a run failed, nothing if it did not."""
    try:
        run()
    except (RunFailed, Stopped) as error:
        return str(error)
    return ""


def after_death(out: Path, reference: Reference, damaged: Collection[int] = ()) -> list[str]:
    """Return what is wrong where a run has just ended. damaged: checkpoints that are so."""
    problems = []
    for step, (state_hash, wrong) in committed(out).items():
        if step not in damaged and (wrong or state_hash != reference.hashes.get(step)):
            problems.append(f"the committed step {step} is not whole: {wrong or state_hash}")
    return problems + left_running(out)


def left_running(out: Path) -> list[str]:
    """Return the processes of a run that are still there after a moment to end."""
    deadline = time.monotonic() + 5
    while (left := ranks_of(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"still runs: {words}" for words in left]


def at_end(
    out: Path, reference: Reference, record: Record, stopped: Collection[int] = ()
) -> list[str]:
    """Return what is wrong with a run that went on to its end.

    stopped: the steps after which it saved because it was told to end."""
    problems, whole = [], reference.record
    if record.checkpoint != whole.checkpoint:
        problems.append(f"another state: {record.checkpoint}")
    if weights_of(out) != reference.weights:
        problems.append("other final weights")
    if record.steps != whole.steps or record.evals != whole.evals:
        problems.append("other losses, norms or evaluations")
    resumed = record.resumed_from
    if resumed and resumed.state_hash != reference.hashes.get(resumed.step):
        problems.append("another state after loading")
    due = {step for step in reference.hashes if step % EVERY == 0}
    kept = sorted(due | set(stopped))[-KEEP:]
    if sorted(committed(out)) != kept:
        problems.append(f"steps {sorted(committed(out))} are there, not {kept}")
    names = [path.name for path in out.rglob("*.part")]
    return problems + [f"{name} was left" for name in names] + left_running(out)


def count_lines(out: Path) -> int:
    """Return the steps that a run has noted."""
    file = out / "steps.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def usable(names: Sequence[str], folder: Path) -> tuple[dict[str, Reference], dict[str, str]]:
    """Return a reference of each strategy, and why others have none."""
    references, why_not = {}, {}
    for strategy in names:
        try:
            references[strategy] = Reference(strategy, folder)
        except RunFailed as error:
            why_not[strategy] = str(error)
    return references, why_not
