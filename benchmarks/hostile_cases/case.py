"""Defines a case: one command, what lies around it, and how it may end."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Word = str | bytes

RIGHT = frozenset({0})
WRONG = frozenset({2})
LACKS = frozenset({2, 3})  # wrong input, or a machine that lacks something
EITHER = frozenset({0, 2, 3})
LIMIT_S = 90.0
SANDBOX = "EXECUTED"  # a file of this name is made by code that nobody asked to run
MINE = "precious to its owner\n"


def nothing(folder: Path) -> None:
    """Lay no file."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Is one command and what lies around it.

    what: in words. arguments: of `hybrid`. make: lays files in the folder of the case, from where
    the command runs. environment: variables to set, None removes one. shell: what bash does before
    it becomes the command, such as `ulimit -n 64` or `exec >&-`. ends: the exit statuses allowed.
    words: each must stand in the line on what is wrong, `a|b` means one of the two. starts: a
    process has to start, or the user's code to run, before the fault can be known, so that the
    limit on CPU time does not hold. own_code: a traceback of the user's own code is shown. out:
    where the command may write. guarded: files there that it may not change all the same. prints:
    a line that the user's own module prints, which is the user's and no part of what is judged."""

    kind: str
    number: int
    what: str
    arguments: Sequence[Word]
    make: Callable[[Path], None] = nothing
    environment: Mapping[str, Word | None] = dataclasses.field(default_factory=dict)
    shell: str = ""
    ends: frozenset[int] = WRONG
    words: Sequence[str] = ()
    starts: bool = False
    own_code: bool = False
    out: Sequence[str] = ("out",)
    guarded: Sequence[str] = ()
    prints: str = ""
    limit_s: float = LIMIT_S

    @property
    def name(self) -> str:
        """Return what `--only` takes."""
        return f"{self.kind}:{self.number}"


Draw = Callable[[random.Random, int], Case]


def draw_in_turn(
    taken: Sequence[Draw], source: random.Random, number: int, tables: Sequence[Draw] = ()
) -> Case:
    """Return the case of a number, of a kind whose draws are taken one after another.

    tables: these get the entries of their table in turn, by a number of their own."""
    place = number % len(taken)
    how = taken[place]
    if how not in tables:
        return how(source, number)
    turn = number // len(taken) * taken.count(how) + taken[:place].count(how)
    return dataclasses.replace(how(source, turn), number=number)


def run_of(seed: int, kind: str, number: int) -> random.Random:
    """Return the source of random numbers of one case, which depends on no other case."""
    return random.Random(f"{seed}/{kind}/{number}")


def write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files, by their paths in a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def laid(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a function that lays files by several, one after another."""

    def make(folder: Path) -> None:
        for step in steps:
            step(folder)

    return make


def shown(value: Word, most: int = 12) -> str:
    """Return the longest piece of a value that any line about it shows as it is."""
    text = os.fsdecode(value)
    pieces, piece = [""], ""
    for c in text[:60]:
        piece = piece + c if c.isascii() and (c.isalnum() or c in "._-/") else ""
        pieces.append(piece)
    return max(pieces, key=len)[:most]


JOB = """[model]
name = "mlp"
options = { sizes = [8, 7, 6, 2] }
[data]
name = "random"
options = { samples = 23, test_samples = 9, features = 8, classes = 2 }
[optimizer]
name = "sgd"
lr = 0.1
[train]
global_batch = 7
micro_batches = 2
steps = 3
[checkpoint]
every = 2
"""
TEXT_JOB = """[model]
name = "gpt"
options = { num_layers = 1, width = 16, num_heads = 2, context = 16, vocab_size = 257 }
[data]
name = "text"
options = { path = "text.txt", context = 16, cache = "tokens" }
[optimizer]
name = "adamw"
lr = 0.01
[train]
global_batch = 3
steps = 2
[checkpoint]
every = 1
"""


def job_with(*changes: tuple[str, str]) -> str:
    """Return the job's text with pieces replaced; each piece stands there once."""
    text = JOB
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def lay_job(folder: Path) -> None:
    """Write the job, and beside it what must not change."""
    write(folder, {"job.toml": JOB, "mine.txt": MINE})


def compare(
    *more: Word, strategies: str = "single", nproc: str = "1", out: Word = "out"
) -> list[Word]:
    """Return the words of a comparison of `job.toml`."""
    words: list[Word] = ["compare", "job.toml", "--strategies", strategies, "--nproc", nproc]
    return [*words, "--out", out, *more]


def train(*more: Word, strategy: str = "single", nproc: str = "1", out: Word = "out") -> list[Word]:
    """Return the arguments of a run."""
    words: list[Word] = ["train", "job.toml", "--strategy", strategy, "--nproc", nproc]
    return [*words, "--out", out, *more]
