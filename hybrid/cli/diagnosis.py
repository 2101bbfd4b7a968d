"""This module has the command that looks at the machine: doctor."""

from pathlib import Path
from typing import Annotated

import typer

from ..job.arguments import Json


def doctor(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Judge these alone: accelerate's YAML or JSON, DeepSpeed's JSON, hostfiles.",
        ),
    ] = None,
    self_test: Annotated[
        bool | None,
        typer.Option(
            "--self-test/--no-self-test",
            help="Run a tiny job under each strategy: 1 or 2 minutes; off under a launcher.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write what a self-test showed, for others, to this file.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Validate such a file alone, and say what it shows.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what this machine lacks and how to mend it; under a launcher, how fast its links are."""
    from ..doctor import check_file, run, run_on_files
    from . import _stdout

    if (files or check) and (self_test is False or out):
        given = "--out" if out else "--no-self-test"
        raise typer.BadParameter(f"{given}: valid without FILE and --check, which start no test")
    if files and check:
        raise typer.BadParameter("--check: valid without FILE")
    if out and not self_test:
        raise typer.BadParameter("--out: valid with --self-test")
    to = _stdout if json else None
    if check:
        raise typer.Exit(check_file(check, to))
    raise typer.Exit(run_on_files(files, to) if files else run(self_test, to, out))


def add_to(app: typer.Typer) -> None:
    """Make it a command of an application."""
    app.command()(doctor)
