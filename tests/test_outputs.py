"""A folder that cannot be, or that has files of others, is refused in one line; these stay."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid.job.errors import JobError, NoRoom
from hybrid.job.file import to_dict
from hybrid.job.outputs import check_new
from hybrid.job.starter import write_starter
from hybrid.job.variants import resolve
from hybrid.launch.folder_lock import LOCK
from hybrid.launch.placement import Placement
from hybrid.training.claiming import claim_for_eval, refuse_lost_job
from hybrid.training.folder import begin_run
from hybrid.training.leftovers import list_run, remove
from tests.conftest import small_job

LONG = "x" * 300
IN_THE_WAY = {
    "": "no path",
    "a\0b": "no path",
    "file": "'file' is there and is no folder",
    "file/x": "'file' is there and is no folder",
    "/dev/null": "is there and is no folder",
    "/proc/x": "No such file",
    "loop/x": "is there and is no folder",
    "dangling": "is there and is no folder",
    "fifo": "is there and is no folder",
    LONG: "File name too long",
    "/": "is the root",
    "~": "is a home",
    "git": "is the top of a checkout",
    "job": "job.json is no file",
    "pipe": "record.json is no file",
    "logs": "logs is no folder",
    "theirs": "record.json is not of this tool",
    "steps": "steps.jsonl is of no run",
    "own": "job.json is of no run",
    "saved": "notes.txt is of no run",
    "locked": "Is a directory",
}


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of folders that are none for results."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("/nonexistent/x")
    os.mkfifo("fifo")
    for folder in ("git/.git", "job/job.json", f"locked/{LOCK}", "saved/checkpoints/step-00000002"):
        Path(folder).mkdir(parents=True)
    files = {"logs/logs": "", "theirs/record.json": '{"a": 1}', "steps/steps.jsonl": "1\n2\n"}
    files |= {"own/job.json": "{}", "saved/checkpoints/step-00000002/notes.txt": "mine"}
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("pipe").mkdir()
    os.mkfifo("pipe/record.json")
    return tmp_path


@pytest.mark.parametrize("out", IN_THE_WAY)
def test_a_folder_that_is_none_is_one_line(out: str, strange: Path) -> None:
    before = sorted(map(str, strange.rglob("*")))
    where = str(Path.home()) if out == "~" else out
    with pytest.raises(JobError, match=IN_THE_WAY[out]) as refused:
        hybrid.train(small_job(), "single", where)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    if out not in ("job", "pipe", "logs", "theirs", "steps", "own", "saved"):  # of a run alone
        with pytest.raises(JobError, match=IN_THE_WAY[out]):
            hybrid.compare(small_job(), ["single"], nproc=1, out=where)
    assert sorted(map(str, strange.rglob("*"))) == before


def test_other_outputs_too(strange: Path) -> None:
    for to in ("file", "file/x", "loop/x", "dangling", "/proc/x", LONG, "y" * 245, ".", "/"):
        with pytest.raises(JobError, match=r"^--to ") as refused:
            check_new(Path(to))
        assert "\n" not in str(refused.value)
    check_new(Path("new/deep/file"))
    assert not Path("new").exists()
    with pytest.raises(JobError, match="too long"):
        write_starter("z" * 253)  # NAME.py could be made, and NAME.toml not
    assert not list(strange.glob("zzz*"))
    Path("scores").mkdir()
    Path("scores/eval.json").write_text("[]")
    refused = pytest.raises(JobError, match=r"eval\.json is not of this")
    with refused, claim_for_eval(Path("scores"), Placement()):
        pass


def test_no_room_is_no_mistake_of_the_author(tmp_path: Path, monkeypatch: Any) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(NoRoom, match=r"out: cannot be written to: No space left on device$"):
        hybrid.train(small_job(), "single", tmp_path / "out")


def test_what_is_not_a_run_s_stays(tmp_path: Path) -> None:
    kept = ["logs/rankings_of_2025.csv", "logs/rank_0.log", "checkpoints/model.pt", "notes.txt"]
    gone = ["checkpoints/step-00000003/manifest.json", "checkpoints/final/model.safetensors"]
    gone += ["steps.jsonl", "checkpoints/step-00000003.part/rank00000.safetensors"]
    halves = [".record.json.0123456789abcdef.part", "steps.jsonl.part"]
    for name in (*kept, *gone, *halves):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    job = small_job()
    file = begin_run(tmp_path, job, resolve(job, "ddp"))
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in gone)
    assert [(tmp_path / name).exists() for name in halves] == [False, True]
    assert tmp_path / halves[1] in list_run(tmp_path)
    remove(list_run(tmp_path / "not there"))
    refuse_lost_job(file, tmp_path, unchanged=True)
    refuse_lost_job(file, tmp_path / "other")
    for out, of in ((tmp_path, (1,)), (tmp_path.parent, (2, 3))):
        with pytest.raises(JobError, match="is the job that was given"):
            refuse_lost_job(file, out, of=of)


def test_the_command_says_it_before_torch(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(to_dict(small_job())))
    code = "import sys; from hybrid.cli import main\ntry:\n    main()\n"
    code += "finally:\n    print('torch' in sys.modules)"
    words = ["train", "job.json", "--strategy", "ddp", "--out"]
    for out, said in ((".", "is the job that was given"), ("", "no path is named so")):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, out],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and done.stdout == "False\n", done.stderr
        assert said in done.stderr and done.stderr.count("\n") == 1
