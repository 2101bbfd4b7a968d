"""Draws surroundings: streams, limits, modules beside the job, folders, variables of the system."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import (
    EITHER,
    LACKS,
    MINE,
    RIGHT,
    Case,
    Word,
    compare,
    draw_in_turn,
    job_with,
    laid,
    lay_job,
    train,
    write,
)
from .grounds import TOUCH, lay_run

KIND = "surroundings"
STREAMS = {
    "stdout closed": ">&-", "stderr closed": "2>&-", "both closed": ">&- 2>&-",
    "stdin closed": "<&-",
    "all three closed": "<&- >&- 2>&-", "stdout full": "> /dev/full", "stderr full": "2> /dev/full",
    "both full": "> /dev/full 2> /dev/full", "nobody reads stdout": "> >(exec true)",
    "stdin is a folder": "< /",
    "stdout cannot be written": "> /dev/null >&0", "stdin without end": "< /dev/zero",
}  # fmt: skip
LIMITS = {
    "64 files": ("ulimit -n 64", EITHER), "24 files": ("ulimit -n 24", EITHER | {1}),
    "no file may be written": ("ulimit -f 0", LACKS | {1}), "files of 1 KiB": ("ulimit -f 1",
        LACKS | {1}),
    "a stack of 1 MiB": ("ulimit -s 1024", EITHER | {1}), "no core": ("ulimit -c 0", RIGHT),
    "no locked memory": ("ulimit -l 0", RIGHT), "no pipes' room": ("ulimit -q 0", RIGHT),
    "umask 777": ("umask 777", EITHER | {1}), "umask 0": ("umask 0", RIGHT),
    "nice": ("renice -n 19 $$ > /dev/null", RIGHT), "signals ignored": ("trap '' HUP INT PIPE CHLD",
        RIGHT),
    "SIGTERM ignored": ("trap '' TERM", RIGHT),
}  # fmt: skip
# Not among them is what Python itself imports before it comes to `hybrid`.
SHADOWS = (
    "random", "json", "typing", "logging", "socket", "copy", "numpy", "torch", "yaml", "string",
    "queue", "signal", "test", "code", "platform", "inspect", "datasets", "accelerate", "select",
    "deepspeed", "transformers", "click", "rich", "secrets", "pydantic", "utils", "models",
    "sitecustomize", "psutil", "tokenize", "filelock", "jinja2", "packaging", "plotly",
)  # fmt: skip


def _short(draw: random.Random) -> list[Word]:
    commands: list[list[Word]] = [
        ["strategies"],
        ["inspect", "run"],
        ["strategies", "--json"],
        ["--version"],
    ]
    return draw.choice(commands)


def _long(draw: random.Random) -> list[Word]:
    return draw.choice(
        [train(), train(), train("--json"), train(strategy="ddp", nproc="2"), compare()]
    )


def _case(
    number: int,
    what: str,
    words: list[Word],
    lay: Callable[[Path], object] = lambda f: None,
    **more: Any,
) -> Case:
    ends = more.pop("ends", RIGHT)
    make = laid(lay_job, *([lay_run] if "run" in words else []), lay)
    return Case(KIND, number, f"{words[0]!s}: {what}", words, make, ends=ends, starts=True, **more)


def streams(draw: random.Random, number: int) -> Case:
    """Close or fill the standard streams."""
    key = list(STREAMS)[number % len(STREAMS)]
    words = _long(draw) if draw.random() < 0.6 else _short(draw)
    lost = (
        "stdout full",
        "both full",
        "nobody reads stdout",
        "stdout cannot be written",
        "stdout closed",
        "both closed",
        "all three closed",
    )
    ends = EITHER | {1} if key in lost and ("--json" in words or words[0] != "train") else RIGHT
    if key == "stdout cannot be written":
        return _case(number, key, words, shell="exec 0< /dev/null; exec >&0", ends=EITHER | {1})
    return _case(number, key, words, shell=f"exec {STREAMS[key]}", ends=ends)


def limits(draw: random.Random, number: int) -> Case:
    """Limit what a process may have."""
    key = list(LIMITS)[number % len(LIMITS)]
    shell, ends = LIMITS[key]
    words = train(strategy="ddp", nproc="2") if draw.random() < 0.4 else train()
    quiet = key.startswith(("no file", "files of"))  # what is printed is a file too
    shell += "; exec 2> /dev/null" if quiet else ""
    return _case(number, key, words, shell=shell, ends=ends, own_code=1 in ends)


def shadows(draw: random.Random, number: int) -> Case:
    """Have a user's module beside the job that is called as one of a library."""
    name = draw.choice(SHADOWS)
    content = draw.choice(
        ["x = 1\n", "", "raise RuntimeError('mine')\n", "import sys\nsys.exit(3)\n"]
    )
    package = draw.random() < 0.2
    path = f"{name}/__init__.py" if package else f"{name}.py"
    words = _long(draw) if draw.random() < 0.5 else _short(draw)
    return _case(
        number,
        f"beside {path} ({content.strip()[:12]})",
        words,
        lambda f: write(f, {path: content}),
    )


def own_module(draw: random.Random, number: int) -> Case:
    """Have the job name a module that is called as one of a library: the user's own is meant."""
    name = draw.choice(["models", "utils", "mm", "model", "my.data", "data", "job", "launch"])
    code = "from torch import nn\ndef make():\n    return nn.Linear(8, 2), nn.CrossEntropyLoss()\n"
    job = job_with(
        ('name = "mlp"', f'name = "{name}:make"'), ("options = { sizes = [8, 7, 6, 2] }", "")
    )
    path = name.replace(".", "/") + ".py"
    return _case(
        number, f"a model of {path}", train(), lambda f: write(f, {"job.toml": job, path: code})
    )


FOLDERS: dict[str, str] = {
    "is no UTF-8": "cd $'x\\xff'", "has a newline": "cd $'a\\nb'", "has spaces": "cd 'a b'",
    "has a colon": "cd a:b",
    "is gone": "mkdir gone; cd gone; rmdir ../gone", "is the root": "cd /", "is /proc": "cd /proc",
    "is deep": "cd deep/$(printf 'd/%.0s' {1..100})",
    "is called as a package": "cd torch", "has an escape": "cd $'\\x1b[31m'",
    "is a link": "cd link",
}  # fmt: skip


def working_folder(draw: random.Random, number: int) -> Case:
    """Start a run in an odd folder."""
    key = list(FOLDERS)[number % len(FOLDERS)]
    names: list[Word] = [
        b"x\xff",
        "a\nb",
        "a b",
        "a:b",
        "deep/" + "d/" * 100,
        "torch",
        "\x1b[31m",
    ]

    def lay(folder: Path) -> None:
        for name in names:
            os.makedirs(os.path.join(os.fsencode(folder), os.fsencode(name)))
        (folder / "link").symlink_to("a b")

    given = _long(draw)
    given[1], given[given.index("--out") + 1] = "../job.toml", "../out"
    ends = EITHER if key in ("is the root", "is /proc", "is gone", "is deep") else RIGHT
    return _case(number, f"the working folder {key}", given, lay, shell=FOLDERS[key], ends=ends)


VARIABLES: dict[str, tuple[dict[str, Word | None], frozenset[int]]] = {
    "TMPDIR is not there": ({"TMPDIR": "/nonexistent/x"}, EITHER),
    "TMPDIR is a file": ({"TMPDIR": "mine.txt"}, EITHER),
    "TMPDIR is relative": ({"TMPDIR": "out"}, EITHER),
    "TMPDIR is empty": ({"TMPDIR": ""}, EITHER),
    "TMPDIR cannot be written": ({"TMPDIR": "/proc"}, EITHER),
    "TMPDIR is no UTF-8": ({"TMPDIR": b"\xff\xfe"}, EITHER),
    "TMPDIR is too long": ({"TMPDIR": "/tmp/" + "x/" * 2000}, EITHER),
    "HOME is not there": ({"HOME": "/nonexistent/x"}, RIGHT),
    "HOME is not set": ({"HOME": None}, RIGHT),
    "HOME is empty": ({"HOME": ""}, RIGHT),
    "HOME is a file": ({"HOME": "mine.txt"}, RIGHT),
    "HOME is no UTF-8": ({"HOME": b"/tmp/\xff"}, RIGHT),
    "XDG_CACHE_HOME is a file": ({"XDG_CACHE_HOME": "mine.txt"}, RIGHT),
    "XDG_CACHE_HOME is relative": ({"XDG_CACHE_HOME": "out"}, RIGHT),
    "XDG_CACHE_HOME is a device": ({"XDG_CACHE_HOME": "/dev/null"}, RIGHT),
    "the locale is C": ({"LC_ALL": "C", "LANG": None}, RIGHT),
    "the locale is POSIX, without UTF-8": (
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        RIGHT,
    ),
    "the locale is not there": ({"LC_ALL": "xx_XX.nosuch", "LANG": "\x1b"}, RIGHT),
    "the locale is Turkish": ({"LC_ALL": "tr_TR.UTF-8"}, RIGHT),
    "streams are ASCII": ({"PYTHONIOENCODING": "ascii"}, RIGHT),
    "streams are UTF-16": ({"PYTHONIOENCODING": "latin-1:strict"}, RIGHT),
    "COLUMNS is 0": ({"COLUMNS": "0"}, RIGHT),
    "COLUMNS is negative": ({"COLUMNS": "-5", "LINES": "x"}, RIGHT),
    "COLUMNS is a word": ({"COLUMNS": "abc"}, RIGHT),
    "TERM is nonsense": ({"TERM": "nosuch", "FORCE_COLOR": None}, RIGHT),
    "OMP_NUM_THREADS is a word": ({"OMP_NUM_THREADS": "abc"}, EITHER),
    "OMP_NUM_THREADS is 0": ({"OMP_NUM_THREADS": "0"}, EITHER),
    "OMP_NUM_THREADS is negative": ({"OMP_NUM_THREADS": "-2"}, EITHER),
    "OMP_NUM_THREADS is empty": ({"OMP_NUM_THREADS": ""}, EITHER),
    "OMP_NUM_THREADS is a list": ({"OMP_NUM_THREADS": "2,1"}, EITHER),
    "CUDA_VISIBLE_DEVICES is a word": ({"CUDA_VISIBLE_DEVICES": "abc"}, RIGHT),
    "asserts are off": ({"PYTHONOPTIMIZE": "2"}, RIGHT),
    "warnings are errors": ({"PYTHONWARNINGS": "error"}, EITHER | {1}),
    "warnings are all shown": ({"PYTHONWARNINGS": "always"}, RIGHT),
    "output is not buffered": ({"PYTHONUNBUFFERED": "1"}, RIGHT),
    "Python is in its development mode": ({"PYTHONDEVMODE": "1"}, RIGHT),
    "PYTHONSAFEPATH": ({"PYTHONSAFEPATH": "1"}, RIGHT),
    "TORCH_LOGS is nonsense": ({"TORCH_LOGS": "nosuch"}, EITHER | {1}),
    "PATH is empty": ({"PATH": "/nonexistent"}, RIGHT),
    "the time zone is nonsense": ({"TZ": "No/Such"}, RIGHT),
    "a variable is no UTF-8": ({"NOSUCH_VARIABLE": b"\xff\xfe"}, RIGHT),
    "very many variables": ({f"V{i}": "x" * 1000 for i in range(1000)}, RIGHT),
    "a locale for messages": ({"LANGUAGE": "de", "LC_MESSAGES": "de_DE.UTF-8"}, RIGHT),
    "PYTHONINSPECT is not set but PYTHONSTARTUP": ({"PYTHONSTARTUP": "evil.py"}, RIGHT),
    "the hub is elsewhere": ({"HF_HOME": "/dev/null", "HF_ENDPOINT": "nosuch"}, RIGHT),
}


def variables(draw: random.Random, number: int) -> Case:
    """Set variables of the system to what nobody means."""
    key = list(VARIABLES)[number % len(VARIABLES)]
    given, ends = VARIABLES[key]
    words = _long(draw) if draw.random() < 0.75 else _short(draw)
    return _case(
        number,
        key,
        words,
        lambda f: write(f, {"evil.py": TOUCH, "mine.txt": MINE}),
        environment=given,
        ends=ends,
        own_code=1 in ends,  # libraries may fail as they are imported
    )


TAKEN = [variables, streams, variables, shadows, variables, limits, working_folder, variables,
         streams, shadows,
         variables, own_module, limits, working_folder, variables]  # fmt: skip


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return draw_in_turn(TAKEN, source, number, (variables, streams, limits, working_folder))
