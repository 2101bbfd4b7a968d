"""Makes the runs of `benchmarks.checkpoint_pairs`, and judges each pair of strategies."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import hybrid
from hybrid import records
from hybrid.checkpoint.names import CHECKPOINTS, step_name
from hybrid.comparison.differences import Run, relative, weight_differences
from hybrid.comparison.repeats import same_bits
from hybrid.comparison.tolerances import tolerance
from hybrid.comparison.verdict import judge_run
from hybrid.job.errors import JobError, RunFailed
from hybrid.job.schema import Checkpoint, Job
from hybrid.job.variants import with_settings
from hybrid.records import Parity, Record
from hybrid.training.check import CheckedJob, check_job
from hybrid.training.progress import Watcher
from hybrid.training.run import launch

SAVED, LEFT = 6, 5  # steps before and after the checkpoint; local SGD has just merged there
NEXT_STEPS = 1e-5  # relative; of the losses after the checkpoint, in fp32
LOCAL, SINGLE = "local_sgd", "single"
JOB: dict[str, Any] = {
    "model": {
        "name": "gpt",
        "options": {
            "num_layers": 5,
            "width": 24,
            "num_heads": 3,
            "context": 13,
            "vocab_size": 101,
            "dropout": 0.1,
            "tied": True,
        },
    },
    "data": {"name": "benchmarks.checkpoint_pair_runs:tokens"},
    # With the usual eps a weight whose gradient is rounding alone moves by the rate, up or down.
    "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.01, "eps": 1e-4},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "train": {"global_batch": 10, "micro_batches": 2, "steps": SAVED + LEFT, "clip_norm": 1.0},
    "strategy": {LOCAL: {"sync_every": 2}},
}


def tokens() -> tuple[Any, Any]:
    """Make sets of random tokens, 13 to a sample, of a vocabulary of 101."""
    import torch
    from torch.utils.data import TensorDataset

    ids = torch.randint(0, 101, (97, 14), generator=torch.Generator().manual_seed(0))
    whole = TensorDataset(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    return whole, TensorDataset(*whole[:7])


def check(precision: str) -> CheckedJob:
    """Return the job in this precision, checked."""
    job = hybrid.load_job(JOB, {"train.precision": precision})
    return check_job(job)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Names a strategy that saves, and one that resumes, each with its number of processes."""

    source: str
    source_ranks: int
    target: str
    target_ranks: int
    precision: str

    @property
    def title(self) -> str:
        """Return what the pair is called in rows and folders."""
        first, second = f"{self.source}_{self.source_ranks}", f"{self.target}_{self.target_ranks}"
        return f"{first}_to_{second}_{self.precision}"

    @property
    def mixes(self) -> bool:
        """Tell whether no single run computes what both do: local SGD does something else."""
        kinds = {
            ranks if name == LOCAL else 1
            for name, ranks in (
                (self.source, self.source_ranks),
                (self.target, self.target_ranks),
            )
        }
        return len(kinds) > 1

    @property
    def alike(self) -> bool:
        """Tell whether both are the same strategy in the same layout."""
        return (self.source, self.source_ranks) == (self.target, self.target_ranks)


class Pairs:
    """Runs pairs in one precision, and keeps the runs that several of them need in `out`."""

    def __init__(self, checked: CheckedJob, out: Path) -> None:
        every = checked.job.log.model_copy(update={"every": 1})
        self.plain = checked.job.model_copy(update={"log": every, "checkpoint": Checkpoint()})
        self.saving = self.plain.model_copy(update={"checkpoint": Checkpoint(every=SAVED)})
        self.out = out
        self.failed: dict[str, RunFailed] = {}  # of the runs that several pairs need

    def run(self, pair: Pair) -> dict[str, Any]:
        """Run one pair and return its row."""
        begun = time.monotonic()
        try:
            figures = self._measure(pair)
        except (JobError, RunFailed) as error:
            failure = error.failure if isinstance(error, RunFailed) else None
            unsupported = failure is not None and failure.kind == "unsupported"
            why = failure.message if failure else str(error)
            return self.refuse(pair, why, "not possible" if unsupported else "broken")
        limit = NEXT_STEPS
        if pair.precision != "fp32":
            limit = tolerance(pair.precision)["loss"]
        holds = figures["hash_same"] and figures["next_steps"] <= limit
        holds = holds and figures["verdict"] == "equal" and figures["bits_same"] is not False
        if holds:
            shutil.rmtree(self.out / pair.title)
        row = {"pair": pair.title, **dataclasses.asdict(pair), **figures}
        seconds = round(time.monotonic() - begun, 1)
        return row | {"outcome": "holds" if holds else "broken", "seconds": seconds}

    def refuse(self, pair: Pair, why: str, outcome: str = "not possible") -> dict[str, Any]:
        """Return the row of a pair that has no result, and the reason."""
        return {
            "pair": pair.title,
            **dataclasses.asdict(pair),
            "outcome": outcome,
            "reason": " ".join(why.split()),
        }

    def _measure(self, pair: Pair) -> dict[str, Any]:
        source = self._base(pair.source, pair.source_ranks)
        self._base(pair.target, pair.target_ranks)  # never interrupted
        label = f"{pair.source}_{pair.source_ranks}"
        folder = self.out / label / CHECKPOINTS / step_name(SAVED)
        saved = json.loads((folder / "manifest.json").read_text())
        record = self._launch(pair.title, self.plain, pair.target, pair.target_ranks, None, folder)
        parity, against = self._judge(pair, record, folder)
        other = against if pair.mixes else source
        run = self._load(pair.title)
        uninterrupted = self._load(f"{pair.target}_{pair.target_ranks}")
        apart = weight_differences(run.weights, uninterrupted.weights)
        first = parity.first_difference
        return {
            "hash_same": _hash_of(record) == saved["state_hash"],
            "next_steps": max(
                relative(one.loss, two.loss)
                for one, two in zip(record.steps[SAVED:], other.steps[SAVED:], strict=True)
            ),
            "against": parity.reference if pair.mixes else label,
            "verdict": parity.state,
            "reason": None if first is None else f"{first.quantity} at {first.step}",
            "excused": len(parity.excused),
            "bits_same": same_bits(run, uninterrupted) if pair.alike else None,
            "from_whole": None if pair.mixes else max((one.size for one in apart), default=0.0),
        }

    def _base(self, name: str, ranks: int) -> Record:
        """Return the run of a strategy that saves after `SAVED` steps and goes on to the end."""
        label = f"{name}_{ranks}"
        if label in self.failed:
            raise self.failed[label]
        try:
            return self._launch(label, self.saving, name, ranks)
        except RunFailed as error:
            self.failed[label] = error
            raise

    def _judge(self, pair: Pair, record: Record, folder: Path) -> tuple[Parity, Record]:
        """Return the verdict on a resumed run, and the record that it was held against.

        Where no run computes what both did, `single` and the further runs that the verdict needs go
        on from the same checkpoint."""
        resume: Path | None = None
        root = SINGLE
        if pair.mixes:
            resume, root = folder, f"{SINGLE}_from_{pair.source}_{pair.source_ranks}"
        reference = self._launch(root, self.plain, SINGLE, 1, None, resume)
        runs, controls = {root: reference, pair.title: record}, dict[str, Record]()
        load = functools.cache(self._load)
        while True:
            found = judge_run(self.plain, pair.title, runs, root, controls, load)
            if isinstance(found, Parity):
                return found, {**controls, **runs}[found.reference]
            for one in found:
                job = with_settings(self.plain, one.strategy, one.changes)
                rest = job, one.strategy, 1, one.cores_for, resume
                controls[one.label] = self._launch(one.label, *rest)

    def _launch(
        self,
        label: str,
        job: Job,
        name: str,
        ranks: int,
        cores_for: int | None = None,
        resume: Path | None = None,
    ) -> Record:
        """Make a run in `out/label`, unless it has ended well there before.

        resume: with the steps of the run before it, as if it were in that run's folder."""
        out = self.out / label
        if (out / "record.json").exists():
            record = records.read(Record, out / "record.json")
            if record.status == "ok":
                return record
        shutil.rmtree(out, ignore_errors=True)
        if resume:
            out.mkdir(parents=True)
            shutil.copy(resume.parent.parent / "steps.jsonl", out)
        return launch(job, name, ranks, out, Watcher(), cores_for=cores_for, resume=resume)

    def _load(self, label: str) -> Run:
        from safetensors.numpy import load_file

        record = records.read(Record, self.out / label / "record.json")
        assert record.weights and record.weights.file
        return Run(record, load_file(self.out / label / record.weights.file))


def _hash_of(record: Record) -> str | None:
    return record.resumed_from.state_hash if record.resumed_from else None
