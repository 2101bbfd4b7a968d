"""Draws folders for the results: odd forms of `--out`, and what already stands in them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import (
    EITHER,
    JOB,
    LACKS,
    MINE,
    RIGHT,
    Case,
    Word,
    compare,
    draw_in_turn,
    laid,
    lay_job,
    shown,
    train,
    write,
)
from .grounds import lay_run

KIND = "folders"
# OUT that cannot be made: the path, and what is laid before.
NONE: dict[str, tuple[Word, Callable[[Path], object]]] = {
    "below a file": ("mine.txt/x", lambda f: None),
    "a file": ("mine.txt", lambda f: None),
    "a device": ("/dev/null", lambda f: None),
    "below a device": ("/dev/null/x", lambda f: None),
    "in /proc": ("/proc/x", lambda f: None),
    "in /sys": ("/sys/kernel/x", lambda f: None),
    "a link to itself": ("loop", lambda f: (f / "loop").symlink_to("loop")),
    "below a link to itself": ("loop/x", lambda f: (f / "loop").symlink_to("loop")),
    "a link to nothing": ("gone", lambda f: (f / "gone").symlink_to("/nonexistent/x")),
    "a name too long": ("n" * 300, lambda f: None),
    "a path too long": ("a/" * 3000, lambda f: None),
    "empty": ("", lambda f: None),
    "a pipe": ("pipe", lambda f: os.mkfifo(f / "pipe")),
    "below a pipe": ("pipe/x", lambda f: os.mkfifo(f / "pipe")),
    "logs is a file": ("dir", lambda f: write(f, {"dir/logs": MINE})),
    "logs is a link to a file": ("dir", lambda f: ((f / "dir").mkdir(),
        (f / "dir/logs").symlink_to("../mine.txt"))),
    "logs is a link elsewhere": (
        "dir", lambda f: (write(f, {"theirs/rank0.log": MINE, "dir/mine.txt": MINE}),
                          (f / "dir/logs").symlink_to("../theirs")),
    ),
    "checkpoints is a link elsewhere": (
        "dir", lambda f: (
            write(f, {"theirs/final/model.safetensors": MINE, "theirs/step-00000002/mine.txt": MINE,
                      "dir/mine.txt": MINE}),
            (f / "dir/checkpoints").symlink_to("../theirs"),
        ),
    ),
    "job.json is a folder": ("dir", lambda f: (f / "dir/job.json/x").mkdir(parents=True)),
    "record.json is a folder": ("dir", lambda f: (f / "dir/record.json/x").mkdir(parents=True)),
    "steps.jsonl is a folder": ("dir", lambda f: (f / "dir/steps.jsonl/x").mkdir(parents=True)),
    "checkpoints is a file": ("dir", lambda f: write(f, {"dir/checkpoints": MINE})),
    "steps.jsonl is a pipe": ("dir", lambda f: ((f / "dir").mkdir(),
                                                os.mkfifo(f / "dir/steps.jsonl"))),
    "job.json is a pipe": ("dir", lambda f: ((f / "dir").mkdir(), os.mkfifo(f / "dir/job.json"))),
    "rank0.log is a folder": ("dir", lambda f: (f / "dir/logs/rank0.log/x").mkdir(parents=True)),
    "job.json is a link to another's": (
        "dir", lambda f: ((f / "dir").mkdir(), (f / "dir/job.json").symlink_to("../mine.txt")),
    ),
    "steps.jsonl is a link to another's": (
        "dir", lambda f: ((f / "dir").mkdir(), (f / "dir/steps.jsonl").symlink_to("../mine.txt")),
    ),
    "rank0.log is a link to another's": (
        "dir", lambda f: ((f / "dir/logs").mkdir(parents=True),
                          (f / "dir/logs/rank0.log").symlink_to("../../mine.txt")),
    ),
    "the folder of the job, named job.json": (".", lambda f: None),
}  # fmt: skip
# OUT that is odd but can be made, or that has files of its owner.
ODD: dict[str, tuple[Word, Callable[[Path], object]]] = {
    "no UTF-8": (b"o\xff\xfe", lambda f: None),
    "with spaces": ("a b  c", lambda f: None),
    "with a newline": ("a\nb", lambda f: None),
    "with an escape": ("a\x1b[31mb", lambda f: None),
    "with quotes": ("a'b\"c", lambda f: None),
    "with a dollar": ("$HOME", lambda f: None),
    "with a percent": ("a%s%d{x}", lambda f: None),
    "a tilde": ("~", lambda f: None),
    "with a dash first": ("./-out", lambda f: None),
    "with a colon": ("a:b", lambda f: None),
    "deep": ("a/" * 60, lambda f: None),
    "with dots": ("a/../a/./b/../b", lambda f: (f / "a").mkdir()),
    "a name as long as can be": ("n" * 255, lambda f: None),
    "logs with files of others": (
        "dir", lambda f: write(f, {"dir/logs/rankings_of_2025.csv": MINE,
                                   "dir/logs/rank0.txt": MINE, "dir/rank.log": MINE}),
    ),
    "names of ours with more behind": (
        "dir", lambda f: write(f, {"dir/record.json.mine": MINE, "dir/job.json.bak": MINE,
                                   "dir/steps.jsonl~": MINE, "dir/x.part": MINE}),
    ),
    "strategies' names with files of others": (
        "dir", lambda f: write(f, {"dir/single/mine.txt": MINE, "dir/ddp/mine.txt": MINE,
                                   "dir/single/logs/mine.log": MINE}),
    ),
    "checkpoints of others": (
        "dir", lambda f: write(f, {"dir/checkpoints.txt": MINE, "dir/final/mine.txt": MINE,
                                   "dir/step-00000001/mine.txt": MINE}),
    ),
    "a link to a folder": ("link", lambda f: ((f / "dir").mkdir(), (f / "link").symlink_to("dir"))),
}  # fmt: skip


def _command(draw: random.Random, out: Word, dear: bool) -> list[Word]:
    how = draw.randrange(5 if dear else 6)
    if how == 0:
        return compare(out=out)
    if how == 1 and not dear:
        return compare(strategies="ddp,zero1", nproc="2", out=out)
    if how in (2, 3) and not dear:
        return train(strategy="ddp", nproc="2", out=out)
    return train(out=out)


def unusable(draw: random.Random, number: int) -> Case:
    """Name a folder for the results that cannot be one."""
    key = list(NONE)[number % len(NONE)]
    out, lay = NONE[key]
    words = _command(draw, out, dear=False)
    inside = out == "dir" or out == "."
    more: dict[str, Any] = {"ends": EITHER if inside else LACKS, "starts": inside}
    if out == ".":
        return own_job(draw, number)
    said = (f"{shown(out)}|out",) if out not in ("", "dir") else ()
    return Case(KIND, number, f"{words[0]} --out: {key}", words, laid(lay_job, lay),
                words=said, out=(str(out),) if inside else (), **more)  # fmt: skip


def own_job(draw: random.Random, number: int) -> Case:
    """Name the folder that the job itself is in, by a name that is ours."""
    name = draw.choice(["job.json", "record.json", "compare.json", "session.json", "eval.json"])
    import tomllib

    text = json.dumps(tomllib.loads(JOB))
    out = draw.choice([".", "../here", "", "x/.."])
    words = _command(draw, out, dear=True)
    words[1] = name
    make = laid(lay_job, lambda f: write(f, {name: text, "x/mine.txt": MINE}))

    return Case(KIND, number, f"{words[0]} {name} --out {out!r}", words, make, ends=LACKS | RIGHT,
                starts=True, out=(".",), guarded=(name,))  # fmt: skip


def odd(draw: random.Random, number: int) -> Case:
    """Name a folder that is odd, or that has files of others."""
    key = list(ODD)[number % len(ODD)]
    out, lay = ODD[key]
    words = _command(draw, out, dear=True)
    return Case(KIND, number, f"{words[0]} --out: {key}", words, laid(lay_job, lay),
                ends=EITHER, starts=True, out=(os.fsdecode(out),))  # fmt: skip


def export_to(draw: random.Random, number: int) -> Case:
    """Export to a path that cannot be written, or that somebody has."""
    to, lay = draw.choice([v for v in NONE.values() if v[0] not in (".", "dir")])
    words: list[Word] = ["export", "run", "--to", to]
    return Case(KIND, number, f"export --to {to[:20]!r}", words, laid(lay_job, lay_run, lay),
                ends=LACKS, words=(f"{shown(to)}|to",), out=())  # fmt: skip


def eval_out(draw: random.Random, number: int) -> Case:
    """Evaluate into a folder that cannot be made."""
    key = draw.choice([k for k, v in NONE.items() if v[0] not in (".", "dir")])
    out, lay = NONE[key]
    words: list[Word] = ["eval", "run", "--out", out]
    return Case(
        KIND, number, f"eval --out: {key}", words, laid(lay_job, lay_run, lay), ends=LACKS, out=()
    )


TAKEN = [unusable, odd, unusable, export_to, unusable, odd, unusable, own_job, unusable, eval_out]


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return draw_in_turn(TAKEN, source, number, (unusable, odd))
