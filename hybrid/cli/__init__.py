"""This module is the command line: each command parses, calls one function, and prints.

Exit status: 0 all held; 1 the run failed or parity did not hold; 2 the job or the command line is
wrong (one line says how); 3 this machine lacks something needed: a package, or room or the right to
write in the folder for the results. torch is imported only by commands that need it."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..job.arguments import (
    ByLauncher,
    CompareOut,
    FreshRanks,
    GoOn,
    Hidden,
    Interrupt,
    JobFile,
    Json,
    KnownBad,
    Names,
    Nproc,
    Out,
    Overrides,
    Reference,
    Resume,
    ResumeAs,
    Strict,
    TrustPickle,
)
from ..job.errors import Stopped
from ..job.shown import printable
from ..launch import farewell
from ..launch.endings import explain, explain_exit, say, suggest, tell, versions
from ..launch.environment import variables_of
from ..launch.stopping import end_now
from ..launch.streams import lasting, problem_of
from . import checkpoints, diagnosis, jobs
from .jobs import load as _load

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train one job under every parallel strategy, prove the runs equal, measure their cost.",
)


def _print_versions(asked: bool) -> None:
    if asked:
        print(versions(), file=_stdout)
        raise typer.Exit


@app.callback()
def _of_all_commands(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the releases of hybrid, torch, accelerate and deepspeed.",
        ),
    ] = False,
) -> None:
    """Train one job under every parallel strategy, prove the runs equal, measure their cost."""
    jobs.check_surroundings(context.invoked_subcommand)


@app.command()
def compare(
    job: JobFile,
    strategies: Names = None,
    reference: Reference = None,
    nproc: Nproc = None,
    out: CompareOut = None,
    resume: Resume = None,
    interrupt: Interrupt = None,
    resume_as: ResumeAs = None,
    overrides: Overrides = None,
    fresh_ranks: FreshRanks = False,
    launcher: ByLauncher = None,
    strict_reference: Strict = False,
    allow_known_bad: KnownBad = False,
    trust_pickle: TrustPickle = False,
    json: Json = False,
) -> None:
    """Run the job under each strategy and hold every run against one, such as `single`."""
    from .. import records
    from ..comparison.resume import choose_folder
    from ..comparison.session import compare as compare_strategies
    from ..records.steps import shorten_all
    from ..training.claiming import refuse_lost_job
    from ..training.progress import Progress

    loaded, out = _load(job, overrides, allow_known_bad, trust_pickle), choose_folder(out, resume)
    refuse_lost_job(job, out, of=(2, 3))
    how: Any = {"interrupt": interrupt, "resume_as": resume_as, "launcher": launcher}
    with contextlib.closing(Progress()) as watcher:
        rest = out, watcher, None, fresh_ranks, reference, resume is not None
        result = compare_strategies(loaded, _split(strategies), nproc, *rest, **how)
    if json:
        print(records.dumps(shorten_all(result)), file=_stdout)  # as compare.json has it
    else:
        _print_table(result)
        print(printable(f"{out / 'report.html'}  {out / 'compare.md'}  {out / 'compare.json'}"))
        own = "" if ":" in loaded.model.name else "; `hybrid init mine` begins a job of your own"
        suggest(f"open {out / 'report.html'} in a browser{own}")
    broken = strict_reference and result.reference_fault is not None
    raise typer.Exit(0 if result.ok and not broken else 1)


@app.command()
def train(
    job: JobFile,
    strategy: Annotated[str, typer.Option(help="The strategy's name; see `hybrid strategies`.")],
    nproc: Nproc = None,
    out: Out = Path("out/train"),
    overrides: Overrides = None,
    fresh_ranks: FreshRanks = False,
    resume: GoOn = None,
    launcher: ByLauncher = None,
    allow_known_bad: KnownBad = False,
    trust_pickle: TrustPickle = False,
    json: Json = False,
    parent: Hidden = None,
    until: Hidden = None,
    launched: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the job once, on a launcher's processes or on `--nproc` of its own."""
    from .. import records
    from ..training.claiming import refuse_lost_job
    from ..training.run import run_job

    loaded = _load(job, overrides, allow_known_bad, trust_pickle, launched)
    if not launched and parent is None:  # else `hybrid` has written the job to its folder
        refuse_lost_job(job, out, unchanged=not (overrides or allow_known_bad or trust_pickle))
    rest = launcher, jobs.num_launched(launched)
    record = run_job(loaded, strategy, out, nproc, parent, fresh_ranks, resume, until, *rest)
    if record is None:
        return
    if json:
        print(records.dumps(record), file=_stdout)
    else:
        rate = f", {record.throughput.samples_per_s:.0f} samples/s" if record.throughput else ""
        loss = f"loss {record.steps[-1].loss:.6f}" if record.steps else "none of them recorded"
        done = record.steps[-1].step + 1 if record.steps else 0
        done = max(done, record.checkpoint.step if record.checkpoint else 0)
        print(printable(f"{strategy}: {done} steps, {loss}{rate}; {out}"))
        suggest(f"`hybrid compare {job} --strategies {strategy}` holds it against one process")


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for the new module.")],
) -> None:
    """Write NAME.toml and NAME.py: a job, a model and data of your own to start from."""
    from ..job.errors import needs_room
    from ..job.starter import write_starter

    with needs_room("."):
        job, module = write_starter(name)
    print(f"{job}  {module}", file=_stdout)
    suggest(f"`hybrid compare {job} --nproc 2`; then put your own model and data into {module}")


@app.command()
def check(
    job: JobFile,
    strategies: Names = None,
    nproc: Nproc = None,
    overrides: Overrides = None,
    allow_known_bad: KnownBad = False,
    trust_pickle: TrustPickle = False,
    json: Json = False,
) -> None:
    """Try the job out on a few samples, and say what stands in the way of which strategy."""
    from .. import records
    from ..training.feasible import check_strategies

    loaded = _load(job, overrides, allow_known_bad, trust_pickle)
    answer = check_strategies(loaded, _split(strategies), nproc)
    if json:
        print(records.dumps(answer), file=_stdout)
    else:
        for line in answer.lines():
            print(line)
    raise typer.Exit(0 if answer.ok else say(answer.why_not(), 2))


checkpoints.add_to(app)
diagnosis.add_to(app)
app.command("dry-run")(jobs.dry_run)


@app.command()
def strategies(json: Json = False) -> None:
    """List the strategies and what each accepts."""
    from .. import records
    from ..report.listing import lines, table

    print(records.dumps(table()) if json else "\n".join(lines()), file=_stdout)


def _split(names: str | None) -> list[str] | None:
    return [name.strip() for name in names.split(",")] if names else None


def _print_table(result: Any) -> None:
    from rich.console import Console

    from .. import report

    console = Console()
    console.width = max(80, console.width)
    console.print(report.console_table(result))


_stdout: Any = sys.stdout


def put(text: Any) -> None:
    """Print a command's result."""
    print(text, file=_stdout)


def _keep_stdout() -> None:
    """Send to stderr what libraries print to stdout, where only results may stand."""
    global _stdout
    _stdout = lasting(sys.stdout, os.dup(1))
    os.dup2(2, 1)


# Every error of the command line is of this class. typer takes it from click or, in recent
# releases, from a copy of its own (typer._click); this finds both.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> None:
    """Run the command line and leave with its exit status."""
    global _stdout
    _stdout = sys.stdout
    farewell.begin()
    signal.signal(signal.SIGTERM, end_now)
    if "CROSS_RANK" in os.environ:  # deepspeed's launcher also passes LOCAL_RANK as an argument
        sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    if "--json" in sys.argv:
        _keep_stdout()
    try:
        status = app(standalone_mode=False)
        if status == 130:  # typer catches Ctrl-C and prints nothing
            status = say("interrupted", status)
    except _USAGE_ERROR as error:
        status = say(error.format_message(), 2)
    except Stopped as error:
        error.tell()
        status = error.code
    except SystemExit as ended:  # by `end_now`, which has had a signal, or by the user's code
        status = explain_exit(ended)
        ranks = "--parent" in sys.argv or variables_of() is not None
        if status == 128 + signal.SIGTERM and not ranks:  # a rank's end is its launcher's to tell
            tell("stopped by a signal")
    except (KeyboardInterrupt, typer.Abort):
        status = say("interrupted", 130)
    except Exception as error:
        status = explain(error)
    _stdout.flush()
    if problem := problem_of(_stdout):
        tell(f"warning: {problem}")
    farewell.leave(status or 0)
