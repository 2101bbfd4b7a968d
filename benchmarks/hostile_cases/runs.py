"""Draws folders of runs: damaged ones, and ones that a stranger wrote."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import WRONG, Case, Word, laid, lay_job, write
from .damage import ANY, TEXTS, mutate_file
from .grounds import TOUCH, lay_run, lay_text_run

KIND = "runs"
RESULTS = frozenset({0, 1, 2})
FINAL = "checkpoints/final"
STEP = "checkpoints/step-00000002"
# What commands read of a run.
FILES = (
    "job.json", "record.json", "steps.jsonl", f"{FINAL}/checkpoint.json",
    f"{FINAL}/model.safetensors",
    f"{STEP}/manifest.json", f"{STEP}/rank00000.safetensors",
)  # fmt: skip
JSON = tuple(name for name in FILES if name.endswith(".json"))


def command_of(draw: random.Random, run: str) -> list[Word]:
    """Return a command that reads a run."""
    commands: list[list[Word]] = [
        ["generate", run, "--tokens", "2"], ["inspect", run], ["export", run, "--to", "out"],
        ["generate", f"{run}/{FINAL}", "--tokens", "2"], ["inspect", f"{run}/{STEP}"],
        ["export", f"{run}/{FINAL}", "--to", "out"], ["inspect", run, "--json"],
        ["export", f"{run}/{STEP}", "--to", "out"],
    ]  # fmt: skip
    dear: list[list[Word]] = [
        ["eval", run, "--out", "out"], ["eval", f"{run}/{STEP}", "--out", "out"],
        ["train", "job.toml", "--strategy", "single", "--nproc", "1", "--out", "out", "--resume",
         run],
        ["train", "job.toml", "--strategy", "single", "--nproc", "1", "--out", run, "--resume",
         "auto"],
        ["compare", "job.toml", "--strategies", "single", "--nproc", "1", "--out", run, "--resume",
         "auto"],
    ]  # fmt: skip
    return draw.choice(commands if draw.random() < 0.8 else dear)


def _case(
    number: int, what: str, words: list[Word], spoil: Callable[[Path], object], **more: Any
) -> Case:
    run = str(words[1]).partition("/")[0]
    run = "text_run" if run == "text_run" else "run"
    lay = lay_text_run if run == "text_run" else lay_run
    starts = words[0] in ("eval", "train", "compare")
    out = (
        "out",
        "tokens",  # the cache that the text's job names
        *(
            w
            for w in ("run", "text_run")
            if "--out" in words and words[words.index("--out") + 1] == w
        ),
    )
    make = laid(lay_job, lay, lambda folder: spoil(folder / run))
    given: dict[str, Any] = {"ends": RESULTS, "starts": starts, "out": out, **more}
    return Case(KIND, number, f"{words[0]}: {what}", words, make, **given)


def _which(draw: random.Random, words_of: Callable[[random.Random, str], list[Word]]) -> list[Word]:
    run = draw.choice(["run", "text_run", "text_run"])
    words = words_of(draw, run)
    if words[0] in ("train", "compare") and run == "text_run":
        return words_of(draw, "run") if draw.random() < 0.5 else ["inspect", run]
    return words


def spoiled(draw: random.Random, number: int) -> Case:
    """Damage one file of a run."""
    words, name = _which(draw, command_of), FILES[number % len(FILES)]
    way = draw.choice(list(ANY))
    seed = draw.random()
    if way == "is huge and sparse" and words[0] != "inspect":
        words = ["inspect", words[1]] if "run" in str(words[1]) else words
    return _case(
        number, f"{name} {way}", words,
        lambda run: ANY[way](run / name, random.Random(seed)),
    )  # fmt: skip


def rewritten(draw: random.Random, number: int) -> Case:
    """Write something else in place of a file of JSON."""
    words, name = _which(draw, command_of), JSON[number % len(JSON)]
    key = draw.choice(list(TEXTS))
    return _case(number, f"{name} is {key}", words, lambda run: write(run, {name: TEXTS[key]}))


def mutated(draw: random.Random, number: int) -> Case:
    """Change one value in a file of JSON; a manifest gets the hash that it should have."""
    words, name = _which(draw, command_of), draw.choice([*JSON[:1], *JSON])
    seed = draw.random()

    def spoil(run: Path) -> None:
        mutate_file(run / name, random.Random(seed))
        if name.endswith("manifest.json"):
            seal(run / name)

    return _case(number, f"a value in {name} (draw {seed:.6f})", words, spoil)


def seal(path: Path) -> None:
    """Give a manifest the hash that it must have, as somebody does who means harm."""
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        return
    values.pop("sha256", None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    path.write_text(json.dumps(values))


NAMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "model": lambda job: job["model"].update(name="evil:make", options={}),
    "os:system": lambda job: job["model"].update(
        name="os:system", options={"command": 'touch "$SANDBOX/EXECUTED"'}
    ),
    "data": lambda job: job["data"].update(name="evil:make", options={}),
    "optimizer": lambda job: job["optimizer"].update(name="evil:make", options={}),
    "schedule": lambda job: job["schedule"].update(name="evil:make", options={}),
    "metrics": lambda job: job["train"].update(metrics=["evil:make"]),
    "a variant's strategy": lambda job: job["variant"].update(x={"strategy": "evil.strategy"}),
    "a tracker": lambda job: job["log"].update(trackers=["evil:make"]),
    "a model without a function": lambda job: job["model"].update(name="evil"),
    "a model with a colon first": lambda job: job["model"].update(name=":make"),
    "weights that are a pickle": lambda job: job["model"].update(weights="evil.pt"),
    "hf: with code": lambda job: job["model"].update(name="hf:evil_hf", options={}),
    "pickle trusted": lambda job: (
        job["launch"].update(trust_pickle=True), job["model"].update(weights="evil.pt")
    ),
    "a tokenizer with code": lambda job: job["data"]["options"].update(tokenizer="evil_hf"),
}  # fmt: skip
EVIL = "class M(dict): pass\n" + TOUCH + "def make(*a, **k): pass\n"
AUTO_MAP = {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M",
            "AutoTokenizer": ["modeling_evil.T", "modeling_evil.T"]}  # fmt: skip


def lay_evil(folder: Path) -> None:
    """Write what a stranger would like to be run."""
    import pickle

    from .grounds import Bomb

    config = json.dumps({"model_type": "evil", "auto_map": AUTO_MAP})
    write(folder, {
        "evil.py": EVIL, "evil/__init__.py": EVIL, "evil/strategy.py": EVIL,
        "evil.pt": pickle.dumps(Bomb()), "evil_hf/config.json": config,
        "evil_hf/tokenizer_config.json": config, "evil_hf/modeling_evil.py": EVIL,
    })  # fmt: skip


def strangers(draw: random.Random, number: int) -> Case:
    """Have the job of a run's folder name code: nothing of it may run."""
    words = _which(draw, command_of)
    key = draw.choice(list(NAMED))

    def spoil(run: Path) -> None:
        lay_evil(run.parent)
        job = json.loads((run / "job.json").read_text())
        NAMED[key](job)
        (run / "job.json").write_text(json.dumps(job))
        manifest = run / STEP / "manifest.json"
        values = json.loads(manifest.read_text())
        values["job"] = job
        manifest.write_text(json.dumps(values))
        seal(manifest)

    return _case(number, f"the folder's job names {key}", words, spoil)


def odd_names(draw: random.Random, number: int) -> Case:
    """Have stray and odd things stand among the checkpoints."""
    names = ["step-00000009", "step-99999999999999999999", "step-0000000x", "step-",
             "step-00000004.part",
             "final2", "..step-00000008", "step-\u0662", "\x1b[31m", "step-00000002 "]  # fmt: skip
    name, words = draw.choice(names), _which(draw, command_of)
    kind = draw.choice(["folder", "file", "link"])

    def spoil(run: Path) -> None:
        path = run / "checkpoints" / name
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.write_text("{}")
        else:
            path.symlink_to("step-00000002")

    return _case(number, f"checkpoints has a {kind} {name!r}", words, spoil)


def no_run(draw: random.Random, number: int) -> Case:
    """Name a folder that is no run."""
    words = command_of(draw, "run")
    name = draw.choice([".", "..", "run/logs", "run/job.json", "mine.txt", "run/checkpoints/none"])
    if words[0] in ("train", "compare"):
        words = ["inspect", name]
    return _case(
        number, f"{name} is read", [words[0], name, *words[2:]], lambda run: None,
        ends=WRONG if name != ".." else RESULTS,
    )  # fmt: skip


TAKEN = [spoiled, mutated, rewritten, spoiled, mutated, strangers, spoiled, mutated, odd_names,
         strangers,
         spoiled, rewritten, mutated, no_run]  # fmt: skip


def draw(source: random.Random, number: int) -> Case:
    """Return the case of a number."""
    return TAKEN[number % len(TAKEN)](source, number)
