"""Draws job files: a share only, since `tests/test_malformed.py` has thousands of them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from tests.malformed_files import JOBS_TOML

from .case import EITHER, JOB, MINE, Case, job_with, train, write

KIND = "jobs"
SIZES, FEATURES, TRAIN = (
    "[8, 7, 6, 2]",
    "features = 8",
    "global_batch = 7\nmicro_batches = 2\nsteps = 3",
)
MORE = "every = 2\n"
# What a job says that cannot be: the change, the strategy, and what the line must name.
IMPOSSIBLE: dict[str, tuple[tuple[str, str], str, str]] = {
    "degrees that do not multiply": ((MORE, MORE + "[parallel]\npp = 3\ndp = 5\n"), "2d", "pp|dp"),
    "a degree without end": ((MORE, MORE + "[parallel]\ndp = 1000000000000\n"), "2d", "dp"),
    "more stages than layers": ((SIZES, "[8, 2]"), "pipeline", "stages|layers"),
    "replicas that do not divide": ((MORE, MORE + "[parallel]\nreplicate = 3\n"), "fsdp",
                                    "replicate"),
    "shards that do not divide": ((MORE, MORE + "[parallel]\nshard = 7\n"), "fsdp", "shard"),
    "micro-batches without end": (("micro_batches = 2", f"micro_batches = {2**63 - 1}"), "ddp",
                                  "micro_batches"),
    "more micro-batches than samples": (("micro_batches = 2", "micro_batches = 99999999"),
                                        "pipeline", "micro_batches"),
    "micro-batches of a strategy": (
        (MORE, MORE + "[strategy.pipeline]\nmicro_batches = 5000000000\n"), "pipeline",
        "micro_batches",
    ),
    "a batch without end": (("global_batch = 7", f"global_batch = {2**62}"), "ddp", "global_batch"),
}  # fmt: skip
# What only the model or the data shows.
UNFIT: dict[str, tuple[tuple[str, str], str]] = {
    "an input width that does not fit": ((FEATURES, "features = 11"), "model|data|8|11"),
    "a width without end": ((SIZES, "[8, 1000000000000000, 2]"), "sizes|model"),
    "too few classes in the model": ((SIZES, "[8, 7, 6, 1]"), "model|data|target|class"),
    "no layers": ((SIZES, "[8]"), "sizes"),
    "sizes of another type": ((SIZES, '"8, 2"'), "sizes"),
    "negative sizes": ((SIZES, "[8, -7, 2]"), "sizes"),
    "a truth for a size": ((SIZES, "[8, true, 2]"), "sizes"),
    "an option of no function": (("samples = 23", "sampels = 23"), "sampels"),
    "no samples": (("samples = 23, test", "samples = 0, test"), "samples"),
    "samples without end": (
        ("samples = 23, test", "samples = 1000000000000000000, test"),
        "samples",
    ),
    "no classes": (("classes = 2", "classes = 0"), "classes"),
    "a model that is unknown": (('"mlp"', '"mlpp"'), "mlpp"),
    "a module that is not there": (('"mlp"', '"nosuch.module:make"'), "nosuch"),
    "a function that is not there": (('"mlp"', '"json:nosuch"'), "nosuch"),
    "a thing that is no function": (('"mlp"', '"sys:path"'), "path"),
    "weights that are not there": (
        ('name = "mlp"', 'name = "mlp"\nweights = "nosuch.safetensors"'),
        "weights",
    ),
    "a metric that is not there": (("steps = 3", 'steps = 3\nmetrics = ["nosuch:f"]'), "metrics"),
    "a tracker that is not there": ((MORE, MORE + '[log]\ntrackers = ["nosuch"]\n'), "trackers"),
    "steps without end": (("steps = 3", f"epochs = {2**62}"), "epochs"),
}
LINES = JOB.splitlines(keepends=True)


def _case(number: int, what: str, text: str | bytes, name: str = "job.toml", **more: Any) -> Case:
    strategy = more.pop("strategy", "single")
    words = train(strategy=strategy, nproc="1" if strategy == "single" else "2")
    words[1] = name
    return Case(
        KIND, number, what, words, lambda f: write(f, {name: text, "mine.txt": MINE}), **more
    )


def malformed(draw: random.Random, number: int) -> Case:
    """Give one of the files that the tests know."""
    name = draw.choice(sorted(JOBS_TOML))
    content, words = JOBS_TOML[name]
    return _case(number, f"malformed: {name}", content, name, words=words)


def impossible(draw: random.Random, number: int) -> Case:
    """Ask for what the job alone shows to be impossible."""
    key = list(IMPOSSIBLE)[number % len(IMPOSSIBLE)]
    change, strategy, word = IMPOSSIBLE[key]
    return _case(number, key, job_with(change), words=(word,), strategy=strategy)


def unfit(draw: random.Random, number: int) -> Case:
    """Have a model, data and options that do not fit together."""
    key = draw.choice(list(UNFIT))
    change, word = UNFIT[key]
    strategy = draw.choice(["single", "ddp", "pipeline"])
    return _case(number, key, job_with(change), words=(word,), starts=True, strategy=strategy)


def shuffled(draw: random.Random, number: int) -> Case:
    """Cut, double or move lines of a job; what comes out may be right."""
    lines = list(LINES)
    for _ in range(draw.choice([1, 1, 2, 4])):
        i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
        how = draw.randrange(3)
        if how == 0:
            del lines[i]
        elif how == 1:
            lines.insert(j, lines[i])
        else:
            lines[i], lines[j] = lines[j], lines[i]
    return _case(number, "lines cut, doubled or moved", "".join(lines), ends=EITHER, starts=True)


def flipped(draw: random.Random, number: int) -> Case:
    """Replace a few letters of a job."""
    text = bytearray(JOB.encode())
    for _ in range(draw.choice([1, 2, 5])):
        text[draw.randrange(len(text))] = draw.choice(b"\0\xff\"'[]{}=.#\n0-ex\x1b\xc3")
    ends = EITHER | {1}
    return _case(number, "letters replaced", bytes(text), ends=ends, starts=True)


def odd_file(draw: random.Random, number: int) -> Case:
    """Name a job that is no file."""
    how = draw.choice(["pipe", "folder", "loop", "dangling", "device", "socket", "stdin"])

    def make(folder: Path) -> None:
        path = folder / "job.toml"
        if how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how != "stdin":
            path.symlink_to({"loop": "job.toml", "dangling": "nosuch", "device": "/dev/zero",
                             "socket": "/proc/self/fd/0"}[how])  # fmt: skip

    words = train()
    words[1] = "/dev/stdin" if how == "stdin" else "job.toml"
    return Case(KIND, number, f"the job is a {how}", words, make, words=(str(words[1]),))


TAKEN = [impossible, unfit, malformed, impossible, unfit, odd_file, unfit, flipped, unfit, shuffled]


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return TAKEN[number % len(TAKEN)](source, number)
