"""Folders that somebody damaged or means harm with: refused by name, and nothing of them is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid.checkpoint.inspection import inspect
from hybrid.checkpoint.manifest import MANIFEST
from hybrid.job.errors import JobError
from hybrid.training.saved import JobFrom, find_saved
from tests.conftest import small_job
from tests.saved import edit, save_checkpoint

Values = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by four ranks."""
    return save_checkpoint(tmp_path_factory.mktemp("run"), small_job(), 6)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(saved, tmp_path / saved.name))


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def weight(values: Values) -> Values:
    """What the manifest says of the first weight."""
    found: Values = values["tensors"]["0.weight"]["weight"]
    return found


def rename_file(name: str) -> Callable[[Values], None]:
    """The first rank's file under another name."""

    def apply(values: Values) -> None:
        values["files"][name] = values["files"].pop("rank00000.safetensors")
        for keys in values["tensors"].values():
            for entry in keys.values():
                for piece in entry["pieces"]:
                    if piece["file"] == "rank00000.safetensors":
                        piece["file"] = name

    return apply


def resized(shape: list[Any], **piece: Any) -> Callable[[Values], None]:
    """The first weight in another shape, with one piece."""

    def apply(values: Values) -> None:
        entry = weight(values)
        first = entry["pieces"][0]
        place = {"file": first["file"], "key": first["key"]}
        entry["shape"], entry["pieces"] = shape, [{**place, **piece}] if piece else entry["pieces"]

    return apply


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HUGE = 10**12
# name: a change of the manifest by somebody who makes its hash anew
HOSTILE: dict[str, Callable[[Values], Any]] = {
    "a name with ..": rename_file("../rank00000.safetensors"),
    "an absolute name": rename_file("/etc/passwd"),
    "another file": rename_file("model.bin"),
    "digits that are none of ours": rename_file("rank\u0660\u0660\u0660\u0660\u0660.safetensors"),
    "a huge shape": resized([HUGE]),
    "a huge shape in one piece": resized([HUGE], flat=[0, HUGE]),
    "a huge box": resized([HUGE, 1], box=[[0, 0], [HUGE, 1]]),
    "a huge box, with room claimed": lambda v: (
        resized([HUGE, 1], box=[[0, 0], [HUGE, 1]])(v),
        [f.update(bytes=10**15) for f in v["files"].values()],
    ),
    "a size of many digits": resized([10**4000]),
    "a negative size": resized([-1, -768]),
    "a size that is text": resized(["many"]),
    "a size that is no number": resized([None]),
    "a piece before the file": resized([32], flat=[-4, 32]),
    "a piece of nothing": resized([32], flat=[0, -32]),
    "a box outside": resized([24, 32], box=[[1, 0], [24, 32]]),
    "a box of other axes": resized([24, 32], box=[[0], [768]]),
    "a piece that is text": lambda v: weight(v).update(pieces=["rank00000.safetensors"]),
    "no pieces": lambda v: weight(v).pop("pieces"),
    "an unknown dtype": lambda v: weight(v).update(dtype="os.system"),
    "a dtype of another width": lambda v: weight(v).update(dtype="F64"),
    "another key": lambda v: weight(v)["pieces"][0].update(key="../../etc/passwd"),
    "a file that is not listed": lambda v: weight(v)["pieces"][0].update(file="rank00009"),
    "claimed gigabytes": lambda v: [f.update(bytes=2**30) for f in v["files"].values()],
    "claimed bytes below nothing": lambda v: [f.update(bytes=-1) for f in v["files"].values()],
    "no hash of a file": lambda v: [f.pop("sha256") for f in v["files"].values()],
    "a hash that is a list": lambda v: [f.update(sha256=[1]) for f in v["files"].values()],
    "another state hash": lambda v: v.update(state_hash="0" * 64),
    "a state hash that is none": lambda v: v.update(state_hash=None),
    "files in a list": lambda v: v.update(files=["rank00000.safetensors"]),
    "tensors in a list": lambda v: v.update(tensors=[1]),
    "a tensor that is text": lambda v: v["tensors"].update({"0.weight": "pickle"}),
    "a layout that is text": lambda v: v.update(layout="!!python/object/apply:os.system"),
    "a step that is text": lambda v: v.update(step="6"),
    "a step below nothing": lambda v: v.update(step=-1),
    "the step of another": lambda v: v.update(step=7),
    "another format": lambda v: v.update(format=2),
    "a job that is text": lambda v: v.update(job="os:system"),
    "no job": lambda v: v.pop("job"),
    "versions of lists": lambda v: v.update(versions={"torch": nested(50)}),
    "rank states that are text": lambda v: v.update(ranks=["x"]),
}


def swap_text(old: str, new: str) -> Callable[[Path, Path], None]:
    """Other text in the manifest, whatever its hash says."""

    def apply(folder: Path, bomb: Path) -> None:
        text = (folder / MANIFEST).read_text()
        assert old in text
        (folder / MANIFEST).write_text(text.replace(old, new, 1))

    return apply


def replace(name: str, make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """Another thing under a file's name."""

    def apply(folder: Path, bomb: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name, bomb)

    return apply


def link(path: Path, bomb: Path) -> None:
    """A symbolic link to the same bytes elsewhere."""
    other = path.parent.parent / f"elsewhere-{path.name}"
    source = path.parent.parent / "source" / path.name
    shutil.copyfile(source, other)
    path.symlink_to(other)


FIRST = "rank00000.safetensors"
# name: a change of the files
DAMAGE: dict[str, Callable[[Path, Path], None]] = {
    "a pickle beside": replace("extra.pkl", lambda p, b: p.write_bytes(pickle.dumps(Bomb(b)))),
    "a pickle for a file": replace(FIRST, lambda p, b: p.write_bytes(pickle.dumps(Bomb(b)))),
    "a pickle for the manifest": replace(
        MANIFEST, lambda p, b: p.write_bytes(pickle.dumps(Bomb(b)))
    ),
    "a link for a file": replace(FIRST, link),
    "a link for the manifest": replace(MANIFEST, link),
    "a folder for a file": replace(FIRST, lambda p, b: p.mkdir()),
    "a pipe for a file": replace(FIRST, lambda p, b: os.mkfifo(p)),
    "a pipe for the manifest": replace(MANIFEST, lambda p, b: os.mkfifo(p)),
    "a folder for the manifest": replace(MANIFEST, lambda p, b: p.mkdir()),
    "deep JSON": replace(MANIFEST, lambda p, b: p.write_text("[" * 100_000)),
    "deep JSON that ends": replace(MANIFEST, lambda p, b: p.write_text("[" * 9**5 + "]" * 9**5)),
    "not a number": swap_text('"step":6', '"step":NaN'),
    "infinity": swap_text('"step":6', '"step":1e999'),
    "a key twice": swap_text('"step":6', '"step":6,"step":6'),
    "not UTF-8": replace(MANIFEST, lambda p, b: p.write_bytes(b'{"format":"\xff"}')),
    "no JSON": replace(MANIFEST, lambda p, b: p.write_text("")),
    "no object": replace(MANIFEST, lambda p, b: p.write_text("6")),
}


@pytest.mark.parametrize("case", [*HOSTILE, *DAMAGE])
def test_a_hostile_folder_is_refused_by_name_and_runs_nothing(case: str, folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "source")
    bomb = folder.parent / "bomb"
    if case in HOSTILE:
        edit(folder, HOSTILE[case])
    else:
        DAMAGE[case](folder, bomb)
    found = inspect(folder)
    assert found.problems and json.dumps(found.to_dict()) and found.lines()
    names = [MANIFEST, FIRST, "rank0000", "extra.pkl"]
    assert all(problem.startswith(tuple(names)) for problem in found.problems), found.problems
    assert not any("\n" in problem for problem in found.problems)
    if case == "another state hash":  # files are whole; whoever loads the state takes its hash
        return
    with pytest.raises(JobError) as refused:
        find_saved(folder, JobFrom(trust=True))
    assert str(folder) in str(refused.value) and found.problems[0] in str(refused.value)
    assert not bomb.exists()


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_file_that_ends_early_is_named(folder: Path, cut: int) -> None:
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[:cut])
    assert [p.partition(":")[0] for p in inspect(folder).problems] == [FIRST]


HEADERS: dict[str, bytes] = {
    "offsets that are fractions": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4.0]}}',
    "offsets of many digits": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 4000,
    "a shape below nothing": b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    "a name twice": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}',
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "text for a tensor": b'{"a":"x"}',
    "outside": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_file_with_a_hostile_header_is_named(case: str, folder: Path) -> None:
    """Its size and hash are those in the manifest: whoever made it made that too."""
    header = HEADERS[case].ljust(-(-len(HEADERS[case]) // 8) * 8)
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / FIRST).write_bytes(data)
    about = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, lambda values: values["files"].update({FIRST: about}))
    found = inspect(folder).problems
    assert found and all(problem.startswith((FIRST, MANIFEST)) for problem in found), found
