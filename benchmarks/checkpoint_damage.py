"""Damages a checkpoint in every way that this script knows, and counts what is refused.

    python -m benchmarks.checkpoint_damage --out FOLDER [--flips N] [--seed N]

A run on three ranks saves three checkpoints. A copy of its folder is damaged once for each way and
each file of the newest checkpoint; then `--resume auto` must skip that one, name the file, and
choose the one before, and nothing may have been executed. FOLDER/checkpoint_damage.md has the
counts."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hybrid
from hybrid.checkpoint.folders import list_checkpoints
from hybrid.checkpoint.manifest import MANIFEST, seal
from hybrid.job.schema import Job
from hybrid.job.variants import resolve
from hybrid.launch.warm import warm_ranks
from hybrid.training.check import check_job
from hybrid.training.progress import Watcher
from hybrid.training.resume import choose
from hybrid.training.run import launch

from .machine import summarise_machine

JOB: dict[str, Any] = {
    "model": {"name": "mlp", "options": {"sizes": [7, 31, 5]}},
    "data": {"name": "random", "options": {"samples": 60, "features": 7, "classes": 5}},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "train": {"global_batch": 10, "steps": 6},
    "checkpoint": {"every": 2},
}
DEEP = "lists in lists"  # stands for five thousand of them
EXECUTED = "executed"  # the file that a pickle would make


class Damage(NamedTuple):
    """Is one way to damage a checkpoint: what it is called, the file to be named, what does it."""

    kind: str
    file: str
    do: Callable[[Path], None]


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def make_run(out: Path) -> Job:
    """Train the job on three ranks, and return it with its lengths in steps."""
    checked = check_job(hybrid.load_job(JOB)).job
    with warm_ranks():
        launch(checked, "ddp", 3, out, Watcher())
    return checked


def damages(run: Path, flips: int, draw: random.Random) -> Iterator[Damage]:
    """Yield every way to damage the newest checkpoint of a run."""
    newest, other = list_checkpoints(run / "checkpoints")[:2]
    files = sorted(path.name for path in newest.iterdir())
    for name in files:
        size = (newest / name).stat().st_size
        for place in [0, 9, size // 2, size - 2, *(draw.randrange(size - 1) for _ in range(flips))]:
            yield Damage("one byte is another", name, lambda f, n=name, p=place: _flip(f / n, p))
        for what, length in (("nothing", 0), ("half", size // 2), ("all but a byte", size - 1)):
            yield Damage(f"cut to {what}", name, lambda f, n=name, s=length: os.truncate(f / n, s))
        yield Damage("removed", name, lambda f, n=name: (f / n).unlink())
        yield Damage("another step's", name, lambda f, n=name: shutil.copy(other / n, f / n))
        yield Damage("a byte longer", name, lambda f, n=name: _append(f / n))
        yield Damage("a folder", name, lambda f, n=name: _folder(f / n))
        if name != MANIFEST:
            yield Damage("a link", name, lambda f, n=name: _link(f / n, other / n))
    ranks = [name for name in files if name != MANIFEST]
    yield Damage("another rank's", ranks[0], lambda f: shutil.copy(f / ranks[1], f / ranks[0]))
    yield Damage("a pickle beside", "x.pkl", lambda f: _bomb(f / "x.pkl", run))
    yield Damage("a pickle in its place", ranks[0], lambda f: _bomb(f / ranks[0], run))
    yield Damage("a pickle in its place", MANIFEST, lambda f: _bomb(f / MANIFEST, run))
    yield Damage("a file beside", ".hidden", lambda f: (f / ".hidden").write_text(""))
    yield from _edits(newest)


def _edits(newest: Path) -> Iterator[Damage]:
    """Yield manifests that were edited, with the right hash of themselves and with the old one."""
    values = json.loads((newest / MANIFEST).read_text())
    stated = values.pop("sha256")
    name = sorted(values["tensors"])[0]
    first, second = sorted(values["files"])[:2]
    piece = ("tensors", name, "weight", "pieces", 0)
    edits: list[tuple[str, tuple[Any, ...], Any]] = [
        ("another step", ("step",), 5),
        ("another format", ("format",), 2),
        ("no step", ("step",), None),
        ("another state hash", ("state_hash",), "0" * 64),
        ("another shape", ("tensors", name, "weight", "shape"), [3, 3]),
        ("a huge shape", ("tensors", name, "weight", "shape"), [10**12, 10**12]),
        ("a negative shape", ("tensors", name, "weight", "shape"), [-1, -1]),
        ("another dtype", ("tensors", name, "weight", "dtype"), "F16"),
        ("no dtype", ("tensors", name, "weight", "dtype"), "object"),
        ("a range too long", (*piece, "flat"), [0, 10**9]),
        ("a range elsewhere", (*piece, "flat"), [1, 3]),
        ("a file outside", (*piece, "file"), "../../../etc/passwd"),
        ("a key that is not there", (*piece, "key"), "nothing"),
        ("a tensor less", ("tensors", name), None),
        ("a file of a name outside", ("files", "../rank00000.safetensors"), {"bytes": 1}),
        ("an absolute file", ("files", "/etc/passwd"), {"bytes": 1, "sha256": "0"}),
        ("another file's hash", ("files", first), values["files"][second]),
        ("no files", ("files",), {}),
        ("a text for a table", ("tensors",), "tensors"),
        ("deep JSON", ("rng",), DEEP),
    ]
    for what, place, value in edits:
        for kind, sealed in (("edited", False), ("edited and sealed anew", True)):
            text = _edited(values, stated, place, value, sealed)
            yield Damage(f"{kind}: {what}", "", lambda f, t=text: _put(f / MANIFEST, t))


def _edited(
    values: dict[str, Any], stated: str, place: tuple[Any, ...], value: Any, sealed: bool
) -> str:
    changed = json.loads(json.dumps(values))
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    if value is None:
        inside.pop(place[-1])
    else:
        inside[place[-1]] = value
    text = seal(changed) if sealed else json.dumps({**changed, "sha256": stated})
    return text.replace(json.dumps(DEEP), "[" * 5000 + "]" * 5000)


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    _put(path, bytes(data))


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _put(path: Path, data: bytes | str) -> None:
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, to: Path) -> None:
    path.unlink()
    path.symlink_to(to)


def _bomb(path: Path, run: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(run / EXECUTED)))


def try_one(run: Path, copy: Path, job: Job, damage: Damage) -> str | None:
    """Damage a copy of a run and choose a checkpoint; return what is wrong with what came."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run / "checkpoints", copy / "checkpoints")
    newest, before = list_checkpoints(copy / "checkpoints")[:2]
    damage.do(newest)
    try:
        found = choose(copy, "auto", resolve(job, "ddp"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if (run / EXECUTED).exists():
        return "a pickle was read"
    if found is None or found.folder != before:
        return f"chose {found and found.folder.name}"
    note = found.notes[0] if found.notes else ""
    if not note.startswith(f"{newest.name} is skipped: {damage.file}"):
        return f"said {note!r}"
    return None


def main() -> None:
    """Try every damage, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--flips", type=int, default=100, help="drawn bytes in each file")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    job = make_run(asked.out / "run")
    tried, wrong = Counter[str](), list[str]()
    for damage in damages(asked.out / "run", asked.flips, random.Random(asked.seed)):
        kind = damage.kind.partition(":")[0]
        tried[kind] += 1
        if problem := try_one(asked.out / "run", asked.out / "copy", job, damage):
            wrong.append(f"{damage.kind} of {damage.file}: {problem}")
            print(wrong[-1], flush=True)
    command = f"python -m benchmarks.checkpoint_damage --flips {asked.flips} --seed {asked.seed}"
    text = "# Damaged checkpoints\n\n"
    text += f"`{command}`: {summarise_machine()}.\n\n"
    text += f"{sum(tried.values())} damages; {len(wrong)} were not refused by the file's name with "
    text += (
        "the checkpoint before chosen; nothing was executed.\n\n| damage | tried |\n|---|---:|\n"
    )
    text += "".join(f"| {kind} | {count} |\n" for kind, count in sorted(tried.items()))
    text += "".join(f"\n- {line}" for line in wrong)
    (asked.out / "checkpoint_damage.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
