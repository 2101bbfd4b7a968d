"""This module finds settings that a run is too short for, or its data too few. No torch here."""

from collections.abc import Iterator

from ...job.schema import Job
from .finding import Finding


def check_lengths(job: Job, num_samples: int, num_tests: int) -> list[Finding]:
    """Find settings without effect in a job whose length in optimizer steps is known.

    num_samples: of the train set; num_tests: of the test set."""
    batch = job.train.global_batch
    found = [*_warm_up(job), *_periods(job, num_samples)]
    if (asked := job.train.eval_batches or 0) > (most := -(-num_tests // batch)):
        given = f"train.eval_batches = {asked}"
        found.append(Finding(f"{given}: the test set has {most} batches; valid: {most} at most"))
    if batch > num_samples:
        has = f"the train set has {num_samples} samples, and so has each step"
        text = f"train.global_batch = {batch}: {has}; valid: 1 to {num_samples}"
        found.append(Finding(text))
    return found


def _warm_up(job: Job) -> Iterator[Finding]:
    """Find a warm-up that the run ends in."""
    warmup, steps = job.schedule.warmup_steps, job.train.steps or 0
    if warmup > steps:
        share = f"{steps} of {warmup} steps"
        text = f"schedule.warmup_steps = {warmup}: the run ends after {share}, so that optimizer.lr"
        yield Finding(f"{text} = {job.optimizer.lr} is never reached; valid: {steps} at most")


def _periods(job: Job, num_samples: int) -> Iterator[Finding]:
    """Find what is to be done every so many steps, in a run that has fewer."""
    steps = job.train.steps or 0
    periods = {
        "checkpoint.every": (job.checkpoint.every, "the state is saved after the last one alone"),
        "train.eval_every": (job.train.eval_every, "no evaluation comes before the last one"),
        "log.every": (job.log.every, "the numbers are read after the last one alone"),
    }
    for key, (every, so) in periods.items():
        if every and every > steps:
            text = f"{key} = {every}: the run has {steps} steps, and {so}; valid: {steps} at most"
            yield Finding(text)
    guard = job.guard
    if guard and guard.spike_factor and guard.window >= steps:
        text = f"guard.window = {guard.window}: the run has {steps} steps, so that no loss is held"
        yield Finding(f"{text} against so many before it; valid: less than {steps}")
    synced, per_epoch = job.strategy.local_sgd.sync_every, -(-num_samples // job.train.global_batch)
    if isinstance(synced, int) and steps < synced != per_epoch:  # which "epoch" has become
        text = f"strategy.local_sgd.sync_every = {synced}: the run has {steps} steps, so that"
        so = f"parameters are averaged after the last one alone; valid: {steps} at most"
        yield Finding(f"{text} {so}", ("local_sgd",))
