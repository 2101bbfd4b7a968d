"""Folders of runs that are damaged, or that somebody made to do harm: one line, and no hang."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid.checkpoint.inspection import inspect
from hybrid.checkpoint.tensors import parts_of
from hybrid.checkpoint.weights import save_weights
from hybrid.comparison.resume import check_session, find_run
from hybrid.job.errors import JobError
from hybrid.job.file import to_dict
from hybrid.models import build_model
from hybrid.training.exporting import export
from hybrid.training.generate import generate
from hybrid.training.resume import decide
from hybrid.training.saved import JobFrom, find_saved

SECONDS = 20  # for one reading, of a second at most
SIZES = {"num_layers": 1, "width": 8, "num_heads": 2, "context": 16, "vocab_size": 257}
JOB = {
    "model": {"name": "gpt", "options": SIZES},
    "data": {"name": "text", "options": {"tokenizer": "bytes", "context": 16}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 1, "micro_batches": 1, "steps": 1},
}
WRONG: list[Any] = [
    None, True, -1, 0, 10**6, 2**31, 2**63, 10**400, 1e308, -1e308, "", "x", "a\0b", "\x1b[31m",
    "\udcff", "x" * 10**6, [], {}, [[]], {"a": None}, [None] * 3, "../..", "/dev/zero", "hf:", ":",
]  # fmt: skip
RAW = ("NaN", "1e999", "-Infinity", "[" * 10**5, '{"a":' * 10**5, '{"a": 1, "a": 2}', "9" * 10**5)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, as a run leaves it, with its final weights alone."""
    run, job = tmp_path_factory.mktemp("run"), hybrid.load_job(JOB)
    weights = build_model(job)[0].tensors()
    save_weights(
        parts_of(weights), run / "checkpoints" / "final", {"step": 1, "strategy": "single"}
    )
    (run / "job.json").write_text(json.dumps(to_dict(job)))
    record = {"strategy": "single", "status": "ok", "world_size": 1, "environment": {}}
    (run / "record.json").write_text(json.dumps(record | {"steps": [], "weights": None}))
    (run / "session.json").write_text(json.dumps({"job": to_dict(job), "nproc": 1, "machine": {}}))
    return run


@pytest.fixture
def in_time() -> Iterator[None]:
    """A reading that waits for ever fails."""

    def fail(*_: Any) -> None:
        raise AssertionError("it does not come to an end")

    before = signal.signal(signal.SIGALRM, fail)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_all(run: Path) -> Iterator[Callable[[], Any]]:
    """Everything that reads a run's folder without starting ranks."""
    job = hybrid.load_job(JOB)
    session = {"job": to_dict(job), "nproc": 1, "machine": {"packages": None}}
    yield lambda: generate(run, "a", num_tokens=2)
    yield lambda: export(run, str(run / "out.safetensors"), JobFrom())
    yield lambda: find_saved(run, JobFrom())
    yield lambda: inspect(run)
    yield lambda: decide(run, str(run), hybrid_choice(job))
    yield lambda: find_run(run, job, "single", 1, session)
    yield lambda: check_session(run, session)


def hybrid_choice(job: Any) -> Any:
    from hybrid.job.variants import resolve

    return resolve(job, "single")


def problems(run: Path) -> list[str]:
    """What is not refused in one line."""
    found = []
    for number, read in enumerate(read_all(run)):
        signal.alarm(SECONDS)
        try:
            read()
        except JobError as error:
            if "\n" in str(error):
                found.append(f"{number}: several lines: {str(error)[:300]}")
        except Exception as error:
            found.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
        finally:
            signal.alarm(0)
        (run / "out.safetensors").unlink(missing_ok=True)
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value in a JSON object."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else []
    for key, item in items:
        yield from places(item, (*path, key))


def mutated(text: str, draw: random.Random) -> str:
    """A JSON text with one value replaced by something wrong, or one key taken away or added."""
    value = json.loads(text)
    *parents, last = draw.choice(list(places(value)))
    section = value
    for key in parents:
        section = section[key]
    how = draw.randrange(4)
    if how == 0:
        del section[last]
    elif how == 1:
        section[draw.choice(["", "x", "__class__", "\x1b", "x" * 10**5])] = draw.choice(WRONG)
    elif how == 2:
        section[last] = "RAW"
        return json.dumps(value).replace('"RAW"', draw.choice(RAW), 1)
    else:
        section[last] = draw.choice(WRONG)
    return json.dumps(value)


FILES = ("job.json", "checkpoints/final/checkpoint.json", "record.json", "session.json")


def hurt(run: Path, good: Path, draw: random.Random) -> str:
    """Copy the good folder, and damage one of its JSON files; which one, and how."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(good, run)
    file = run / draw.choice(FILES)
    text = mutated(file.read_text(), draw)
    file.write_text(text)
    return f"{file.name}: {text[:600]}"


@pytest.mark.parametrize("seed", range(4))
def test_a_json_with_anything_in_it_is_one_line(
    good: Path, tmp_path: Path, seed: int, in_time: None
) -> None:
    for number in range(int(os.environ.get("STRANGE", "10"))):
        what = hurt(tmp_path / "run", good, random.Random(f"{seed} {number}"))
        assert not problems(tmp_path / "run"), (seed, number, what)
