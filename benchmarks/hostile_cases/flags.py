"""Draws command lines: every command and option, with values that nobody should give."""

from __future__ import annotations

import functools
import random
from typing import Any

from .case import EITHER, RIGHT, WRONG, Case, Word, draw_in_turn, laid, lay_job, shown
from .grounds import lay_run, lay_text_run

KIND = "flags"
GOOD: dict[str, list[Word]] = {
    "compare": ["job.toml", "--strategies", "single", "--nproc", "1", "--out", "out"],
    "train": ["job.toml", "--strategy", "single", "--nproc", "1", "--out", "out"],
    "check": ["job.toml", "--strategies", "single", "--nproc", "1"],
    "dry-run": ["job.toml", "--strategy", "ddp", "--world", "4"],
    "init": ["mine"],
    "inspect": ["run"],
    "eval": ["run", "--out", "out"],
    "export": ["run", "--to", "out"],
    "generate": ["text_run", "--tokens", "1"],
    "sample": ["text_run", "--tokens", "1"],
    "strategies": [],
    "doctor": ["job.toml"],
}
NO_NUMBER: list[Word] = [
    "abc", "1.5", "0x10", "--", "-", "1e3", "nan", "\u0663", "1 2", "9" * 30 + "x", "", b"\xff\xfe",
    "1;2", "None", "[1]", "\x1b[31m1", "1" * 5000,
]  # fmt: skip
NOT_POSITIVE: list[Word] = ["0", "-1", "-" + "9" * 30, "-0"]
HUGE: list[Word] = ["1" + "0" * 12, "9" * 30, "1000000", "99999"]
NO_NAME: list[Word] = [
    "nosuch", "SINGLE", " ", "", b"\xff", "s\u0456ngle", "single,", ",", ",,", "single,nosuch",
    "x" * 100000, "\x1b[31mred\n", "os:system", "../single", "single;ddp", "single ddp", "None",
    "*",
]  # fmt: skip
NO_FILE: list[Word] = [
    "nosuch", "", "n" * 300, b"\xff\xfe", "mine.txt/x", "/dev/null", "/dev/zero", "/proc/self/mem",
    "nul\x1b[31m\n", "~", "-", "/" * 4000 + "x", "https://example.org/x", ".",
]  # fmt: skip
NO_OVERRIDE: list[Word] = [
    "", "=", "a", "a.b", "train.steps", "train.steps=", "train.steps=abc", "train..steps=1", ".=1",
    "train.steps=[", "model.options=1", "nosuch.key=1", "train.steps=-1", "train.steps=0",
    "train.steps=" + "9" * 5000, "train=1", "=1", "train.steps = 1 2", "a." * 20000 + "b=1",
    "optimizer.lr=nan", "optimizer.lr=-inf", b"train.steps=\xff", "model.name=os:system\x1b[2J",
    "train.precision=fp7", "train.stepz=2", "parallel.pp=0", "variant.x.strategy=nosuch",
    "launch.start_timeout_s=-1", "checkpoint.every=0", "train.metrics=[1]", "strategy.zero9.x=1",
    "model.options.sizes=[8,", "train.steps=1979-05-27", "data.workers=-1", "data.workers=1.0",
]  # fmt: skip


@functools.cache
def parameters() -> dict[str, list[Any]]:
    """Return the parameters of every command, as the command line itself defines them."""
    import typer.main

    from hybrid.cli import app

    group: Any = typer.main.get_command(app)
    return {name: list(command.params) for name, command in group.commands.items()}


def options() -> list[tuple[str, Any]]:
    """Return every option of every command, also those that `--help` does not show."""
    found = [(c, p) for c, them in sorted(parameters().items()) for p in them]
    return [(c, p) for c, p in found if p.opts[0].startswith("--") and p.name != "help"]


def values_of(option: Any) -> list[Word]:
    """Return values that an option must refuse."""
    name = option.opts[0]
    if name in ("--nproc", "--interrupt", "--top-k", "--parent", "--until"):
        more = {"--nproc": HUGE + NOT_POSITIVE, "--interrupt": NOT_POSITIVE[:3] + HUGE}
        return NO_NUMBER + more.get(name, [])
    if name == "--world":
        return NO_NUMBER + HUGE + NOT_POSITIVE
    if name == "--rank":
        return [*NO_NUMBER, *HUGE, "-1", "4"]
    if name == "--tokens":
        return NO_NUMBER + NOT_POSITIVE
    if name == "--seed":
        return [*NO_NUMBER, "-1", "9" * 30]
    if name == "--temperature":
        return ["abc", "nan", "inf", "-1", "-inf", "", b"\xff", "1,5", "1e999", "0x1p3"]
    if name == "--set":
        return NO_OVERRIDE
    if name == "--prompt":
        return [b"\xff\xfe", b"abc\xed\xa0\x80"]
    if name in ("--out", "--to"):
        return ["", "mine.txt", "mine.txt/x", "/dev/null", "/proc/x", "n" * 300]
    if name == "--resume":
        return [v for v in NO_FILE if v not in (".", "~", "-")] + ["AUTO", " auto"]
    return NO_FILE[:12] if name == "--job" else NO_NAME


def base(command: str, without: str) -> list[Word]:
    """Return a command that is right, without one of its options."""
    words = list(GOOD[command])
    if without in words:
        at = words.index(without)
        del words[at : at + 2]
    return [command, *words]


def _case(number: int, what: str, arguments: list[Word], **more: Any) -> Case:
    runs = {"run": lay_run, "text_run": lay_text_run}
    named = [lay for name, lay in runs.items() if any(str(w).startswith(name) for w in arguments)]
    make = laid(lay_job, *named)
    starts = arguments[0] == "compare" and "--interrupt" in arguments
    return Case(KIND, number, what, arguments, make, starts=starts, **more)


def wrong_value(draw: random.Random, number: int) -> Case:
    """Give an option a value that it must refuse."""
    valued = [(c, p) for c, p in options() if not p.is_flag and not p.hidden]
    command, option = valued[number % len(valued)]
    name, value = option.opts[0], draw.choice(values_of(option))
    joined = draw.random() < 0.5 or value in ("--", "-") or str(value).startswith("-")
    given: list[Word] = [_join(name, value)] if joined else [name, value]
    said = (f"{name}|{name.lstrip('-')}|{name.lstrip('-').replace('-', '_')}",)
    if name in ("--strategies", "--reference", "--resume-as"):
        said = ("strateg|reference|resume|variant",)
    words = (*said, shown(value)) if name not in ("--set", "--job", "--resume", "--prompt") else ()
    if name in ("--out", "--to"):
        words = (f"{shown(value)}|{name}",)
    return _case(
        number, f"{command} {name} = {value[:40]!r}", [*base(command, name), *given], words=words
    )


def _join(name: str, value: Word) -> Word:
    return name.encode() + b"=" + value if isinstance(value, bytes) else f"{name}={value}"


def no_value(draw: random.Random, number: int) -> Case:
    """Give an option no value, at the end of the line."""
    valued = [(c, p) for c, p in options() if not p.is_flag]
    command, option = draw.choice(valued)
    name = option.opts[0]
    return _case(number, f"{command} {name} alone", [*base(command, name), name], words=(name,))


def doubled(draw: random.Random, number: int) -> Case:
    """Give an option twice, the second time a value that it must refuse."""
    valued = [(c, p) for c, p in options() if not p.is_flag and not p.hidden]
    command, option = draw.choice(valued)
    name, value = option.opts[0], draw.choice(values_of(option))
    good: list[Word] = GOOD[command]
    first: list[Word] = [] if name in good else [_join(name, "1" if "set" not in name else "a.b=1")]
    words = [command, *good, *first, _join(name, value)]
    return _case(number, f"{command} {name} twice, = {value[:40]!r}", words)


def valued_flag(draw: random.Random, number: int) -> Case:
    """Give a flag a value."""
    command, option = draw.choice([(c, p) for c, p in options() if p.is_flag])
    name = option.opts[0]
    given = f"{name}={draw.choice(['yes', '1', 'true', '', 'no'])}"
    return _case(number, f"{command} {given}", [*base(command, name), given], words=(name,))


def unknown(draw: random.Random, number: int) -> Case:
    """Give an option that no command has, or one of another command."""
    command = draw.choice(sorted(GOOD))
    known = {o for p in parameters()[command] for o in (*p.opts, *p.secondary_opts)}
    other = {p.opts[0] for _, p in options()} - known
    made = [
        "--nosuch",
        "--nporc=2",
        "-x",
        "--s\u0442rategy",
        "--set.train.steps=1",
        "---",
        "-1",
        "--Nproc=1",
    ]
    name: str = draw.choice(sorted(other) + made)
    words: list[Word] = [command, *GOOD[command], name]
    return _case(number, f"{command} {name}", words, words=(shown(name),))


def too_many(draw: random.Random, number: int) -> Case:
    """Give one argument more than a command takes, or one fewer."""
    command = draw.choice([c for c in sorted(GOOD) if c not in ("doctor", "strategies")])
    if draw.random() < 0.5:
        given = draw.choice(["other.toml", "", "job.toml", "x" * 5000, "\x1b[31m"])
        return _case(number, f"{command} {given[:20]!r} too", [command, *GOOD[command], given])
    rest = GOOD[command][1:]
    return _case(number, f"{command} without its argument", [command, *rest])


def no_command(draw: random.Random, number: int) -> Case:
    """Give a command that there is not."""
    names: list[Word] = ["trian", "", b"\xff\xfe", "--", "TRAIN", "train ", "x" * 100000,
                         "\x1b[31m",
                         "help", "-c", "--json", "../train", "__main__", "add_to",
                         "sampel"]  # fmt: skip
    name = draw.choice(names)
    ends = WRONG if name != "--" else EITHER
    return _case(number, f"the command {name[:30]!r}", [name, "job.toml"], ends=ends)


def init_name(draw: random.Random, number: int) -> Case:
    """Give `hybrid init` a name that is none, or that is taken."""
    names: list[Word] = ["", "a/b", "../x", "a b", "1a", "class", "mine.txt", ".hidden", "x" * 300,
                         "job",
                         b"\xff", "-x", "random", "torch", "hybrid", "a.b", "\u0455", "x\n", "None",
                         "/tmp/x", "import", "os", "typing", "a-b", "__init__",
                         "x\x1b[31m"]  # fmt: skip
    name = draw.choice(names)
    ends = EITHER if name in ("\u0455", "__init__", "a-b") else WRONG
    out = tuple(f"{name!s}{end}" for end in (".py", ".toml")) if ends is EITHER else ()
    return _case(number, f"init {name[:30]!r}", ["init", name], ends=ends, out=out)


def asks_for_help(draw: random.Random, number: int) -> Case:
    """Ask a command for help behind what it would take or refuse; that is no fault."""
    command = draw.choice(sorted(GOOD))
    return _case(number, f"{command} --help", [command, *GOOD[command], "--help"], ends=RIGHT)


def wrong_argument(draw: random.Random, number: int) -> Case:
    """Give a command something else than what it reads."""
    command = draw.choice(
        ["compare", "train", "check", "inspect", "eval", "export", "generate", "doctor"]
    )
    value = draw.choice([v for v in NO_FILE if v != ""] + ["run/job.json/x", "mine.txt"])
    given = value if not str(value).startswith("-") else f"./{value!s}"
    words: list[Word] = [command, given, *GOOD[command][1:]]
    ends = frozenset({0, 1, 2}) if command == "doctor" or value == "." else WRONG
    return _case(number, f"{command} {value[:30]!r}", words, ends=ends)


TAKEN = [wrong_value] * 9 + [no_value, doubled, valued_flag, unknown, too_many, no_command]
TAKEN += [init_name, init_name, wrong_argument, wrong_argument, doubled, asks_for_help]


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return draw_in_turn(TAKEN, source, number, (wrong_value,))
