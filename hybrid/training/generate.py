"""Generates text from the weights of a run, for a person to look at: `hybrid generate RUN`.

What can be refused without torch is refused here; `hybrid.training.sampling` writes the text."""

import math
from pathlib import Path

from ..job.errors import JobError
from .saved import JobFrom, find_saved


def generate(
    run: Path,
    prompt: str = "",
    num_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    top_k: int | None = None,
    trust: bool = False,
    job: Path | None = None,
) -> str:
    """Return the prompt and at most `num_tokens` tokens that the run's model writes after it.

    run: the folder of one run, or that of a checkpoint. trust: see `hybrid.training.saved`; job: a
    file with the job, if it is not that of the folder. The prompt is the beginning of
    a document; the text stops early where the model ends that document. temperature: the divisor of
    the logits; 0 takes the likeliest token each time. top_k: draw from so many likeliest tokens
    only. The same arguments give the same text on one machine. Raises JobError where an argument or
    the folder is wrong."""
    _check(num_tokens, temperature, seed, top_k)
    saved = find_saved(run, JobFrom(job, (), trust))
    if saved.job.data.name != "text":
        name = saved.job.data.name
        raise JobError(f"{run}: data.name = {name!r}: only a run on 'text' writes text")
    from .sampling import sample  # torch comes with it

    return sample(saved, prompt, num_tokens, temperature, seed, top_k)


def _check(num_tokens: int, temperature: float, seed: int, top_k: int | None) -> None:
    if num_tokens < 1:
        raise JobError(f"tokens = {num_tokens}: valid: 1 or more")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise JobError(f"temperature = {temperature}: valid: 0 or more; 0 is greedy")
    if not 0 <= seed < 2**32:  # torch's CPU generator uses no more bits
        raise JobError(f"seed = {seed}: valid: 0 up to 2**32 - 1")
    if top_k is not None and top_k < 1:
        raise JobError(f"top_k = {top_k}: valid: 1 or more")
