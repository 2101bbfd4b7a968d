"""This module has the commands on checkpoints: inspect, eval, export, generate."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..job.arguments import (
    CheckpointPath,
    EvalOut,
    FreshRanks,
    Hidden,
    JobOfCheckpoint,
    Json,
    Nproc,
    Overrides,
    Prompt,
    Seed,
    Temperature,
    Tokens,
    TopK,
    Trust,
)


def inspect(
    checkpoint: CheckpointPath,
    json: Json = False,
) -> None:
    """Verify a checkpoint; say its step, its layout, its sizes, the hash of its state."""
    from .. import records
    from ..checkpoint.inspection import inspect as inspect_folder

    found = inspect_folder(checkpoint)
    _print(records.dumps(found.to_dict()) if json else "\n".join(map(_shown, found.lines())))
    raise typer.Exit(1 if found.problems else 0)


def _check_given(folder: Path, job: Path | None, overrides: list[str] | None) -> None:
    """Refuse what the command line shows to be wrong before a checkpoint is read and verified.

    The job of the folder itself is read later, with the rest of what is there."""
    from ..checkpoint.names import VALID
    from ..job.errors import JobError
    from ..job.file import load_job, parse_pair
    from ..launch.environment import variables_of

    for text in overrides or ():
        parse_pair(text)
    if variables_of() is None and not os.path.isdir(folder):  # else a rank says it, and its host
        raise JobError(f"{folder}: is no folder; {VALID}")
    if job is not None:
        load_job(job, overrides or ())


def evaluate(
    checkpoint: CheckpointPath,
    strategy: Annotated[str, typer.Option(help="The strategy that evaluates.")] = "single",
    nproc: Nproc = None,
    out: EvalOut = Path("out/eval"),
    job: JobOfCheckpoint = None,
    overrides: Overrides = None,
    fresh_ranks: FreshRanks = False,
    trust: Trust = False,
    json: Json = False,
    parent: Hidden = None,
) -> None:
    """Evaluate a checkpoint as its run does, under any strategy; writes OUT/eval.json."""
    from .. import records
    from ..launch.placement import find_placement
    from ..training.claiming import claim_for_eval

    _check_given(checkpoint, job, overrides)
    with claim_for_eval(out, find_placement(started_by_hybrid=parent is not None)):
        from ..training.evaluating import Asked, evaluate_saved
        from ..training.saved import JobFrom

        given = JobFrom(job, overrides or (), trust)
        asked = Asked(checkpoint, strategy, given, out, nproc, parent, fresh_ranks)
        result = evaluate_saved(asked)
    if result is None:
        return
    if json:
        _print(records.dumps(result))
    else:
        figures = ("loss", "accuracy", "perplexity")
        shown = [f"{key} {result[key]:.6f}" for key in figures if result[key] is not None]
        step = result["checkpoint"]["step"]
        _print(_shown(f"{strategy}: step {step}, {', '.join(shown)}; {out / 'eval.json'}"))


def export(
    checkpoint: CheckpointPath,
    to: Annotated[
        str, typer.Option("--to", metavar="PATH", help="A new file; for hf: models a new folder.")
    ],
    job: JobOfCheckpoint = None,
    overrides: Overrides = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Write the weights as one safetensors file, or as a Hugging Face folder."""
    from .. import records
    from ..job.outputs import check_new, read_folder
    from ..launch.folder_lock import refuse_held

    path = read_folder(to, "--to")
    if to.partition(":")[0] not in ("deepspeed-universal", "dcp"):  # which `export` refuses
        refuse_held(path.parent)
        check_new(path)
    _check_given(checkpoint, job, overrides)
    from ..training.exporting import export as export_weights
    from ..training.saved import JobFrom

    result = export_weights(checkpoint, to, JobFrom(job, overrides or (), trust))
    if json:
        _print(records.dumps(result))
    else:
        _print(_shown(f"{result['path']}: {result['tensors']} tensors, {result['bytes']:,} bytes"))


def generate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run's folder, OUT or OUT/STRATEGY; a step's.")
    ],
    prompt: Prompt = "",
    tokens: Tokens = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    seed: Seed = 0,
    job: JobOfCheckpoint = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Write text from the weights of a run on text, or of a checkpoint."""
    from .. import records
    from ..job.shown import without_controls

    _check_given(run, job, None)
    from ..training.generate import generate as generate_text

    text = generate_text(run, prompt, tokens, temperature, seed, top_k, trust, job)
    _print(records.dumps({"prompt": prompt, "text": text}) if json else without_controls(text))


def add_to(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command("inspect")(inspect)
    app.command("eval")(evaluate)
    app.command("export")(export)
    app.command("sample", hidden=True)(generate)
    app.command("generate")(generate)


def _print(text: Any) -> None:
    from . import put

    put(text)


def _shown(line: str) -> str:
    from ..job.shown import printable

    return printable(line)
