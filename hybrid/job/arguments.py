"""This module has the arguments and options that several commands of the command line take."""

import math
import re
from pathlib import Path
from typing import Annotated

import typer

from .reading import show

MOST_DIGITS = 4000  # Python makes no number of more than 4300


def _folder(text: str) -> Path:
    from .errors import JobError
    from .outputs import read_folder

    try:
        return read_folder(text)
    except JobError as error:
        raise typer.BadParameter(str(error).partition(": ")[2]) from None


JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job: a TOML file.")]
Out = Annotated[Path, typer.Option(parser=_folder, metavar="DIR", help="Folder for the results.")]

CompareOut = Annotated[
    Path | None,
    typer.Option(
        parser=_folder, metavar="DIR", help="Folder for the results. Left out: out/compare."
    ),
]


def _processes(text: str) -> int:
    if not (text.isascii() and text.isdigit() and text.strip("0")):
        raise typer.BadParameter(f"{show(text)} is no number of processes; valid: 1 or more")
    return int(text[:MOST_DIGITS])  # which is too many all the same (`hybrid.launch.limits`)


def whole_number(text: str | int) -> int:
    """Read an option's whole number; the error shows what was given."""
    if isinstance(text, int):  # an option's default
        return text
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise typer.BadParameter(f"{show(text)} is no whole number")
    return int(text)


Nproc = Annotated[
    int | None,
    typer.Option(
        parser=_processes, metavar="N", help="Processes. Left out: as [parallel] says, or 2."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override one key of the job; repeatable."),
]
FreshRanks = Annotated[
    bool,
    typer.Option("--fresh-ranks", help="Start each rank afresh, not by a fork of one process."),
]
ByLauncher = Annotated[
    str | None,
    typer.Option(
        "--launcher",
        metavar="COMMAND",
        help='Starts the ranks, such as "srun -n {nproc}". Left out: hybrid starts them itself.',
    ),
]
KnownBad = Annotated[
    bool, typer.Option("--allow-known-bad", help="Run releases that are known to train wrongly.")
]
Names = Annotated[
    str | None,
    typer.Option(help="Comma-separated names, of the job's variants too. Left out: all."),
]
Reference = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Hold the runs against this one. Left out: single."),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict-reference/--no-strict-reference",
        help="Exit with 1 where the reference did not repeat itself.",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="auto|DIR",
        help="Keep the runs in OUT, or in DIR, that ended well; those that were stopped go on.",
    ),
]
Interrupt = Annotated[
    int | None,
    typer.Option(
        parser=whole_number,
        metavar="STEP",
        help="Stop each run after so many steps and resume it: tests checkpoints.",
    ),
]
ResumeAs = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="With --interrupt: resume under this strategy or variant."),
]
GoOn = Annotated[
    str | None,
    typer.Option(
        "--resume", metavar="auto|PATH", help="Go on from OUT's newest checkpoint, or from PATH."
    ),
]
CheckpointPath = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder, or a run's: its newest."),
]
EvalOut = Annotated[
    Path, typer.Option(parser=_folder, metavar="DIR", help="Folder for eval.json and logs.")
]
JobOfCheckpoint = Annotated[
    Path | None,
    typer.Option("--job", metavar="JOB", help="The job, in place of the one in the folder."),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Run the code that the folder's job names by import path.")
]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Read pickled model.weights, by a loader that runs none."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def _positive(text: str | int) -> int:
    if (number := whole_number(text)) < 1:
        raise typer.BadParameter(f"{show(text)}: valid: 1 or more")
    return number


def _seed(text: str | int) -> int:
    if not 0 <= (number := whole_number(text)) < 2**32:  # torch's CPU generator uses no more bits
        raise typer.BadParameter(f"{show(text)}: valid: 0 up to 2**32 - 1")
    return number


def _temperature(text: str | float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise typer.BadParameter(f"{show(text)}: valid: a number, 0 or more; 0 is greedy")
    return number


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # the command line held bytes that are no text
        raise typer.BadParameter(f"{show(text)}: is not UTF-8 text") from None
    return text


Prompt = Annotated[
    str, typer.Option(parser=_text, metavar="TEXT", help="What the text begins with.")
]
Temperature = Annotated[
    float,
    typer.Option(parser=_temperature, metavar="NUMBER", help="0 takes the likeliest token."),
]
Tokens = Annotated[
    int, typer.Option(parser=_positive, metavar="N", help="Tokens to write at most.")
]
TopK = Annotated[
    int | None,
    typer.Option(parser=_positive, metavar="N", help="Draw from so many likeliest only."),
]
Seed = Annotated[int, typer.Option(parser=_seed, metavar="N", help="Seed of the draws.")]
Hidden = Annotated[int | None, typer.Option(parser=whole_number, hidden=True)]
