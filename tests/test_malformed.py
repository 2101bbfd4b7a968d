"""Files that no one should write, and some do: each ends with 2, one line, and next to no cost.

Jobs, DeepSpeed configurations, what launchers hand to their ranks, and files for launchers. Of an
accelerate YAML, which is read before any rank starts, a rank sees and refuses variables; the file
itself is judged by `hybrid doctor FILE`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import JOBS, hybrid_command
from tests.malformed_files import DS_CONFIGS, JOB, JOBS_TOML, LAUNCHERS, ODD_JOBS
from tests.malformed_launch_files import (
    ACCELERATE_FILES,
    DEEPSPEED_FILES,
    HOSTFILES,
    LAUNCH_FILES,
    ODD_LAUNCH_FILES,
)

LINEAR = str(JOBS / "linear.toml")
CPU_S = 1.0  # of a whole command
TYPED = ["binary.toml", "dots.toml", "deep.json", "pipe.toml", "sparse.json", "nested garbage"]
TYPED += ["long key", "FSDP for ZeRO", "doctor launch/bomb.yaml"]


def cases() -> dict[str, tuple[list[str], dict[str, str], list[str]]]:
    """Name of each case: command line, environment, words of its line."""
    found: dict[str, tuple[list[str], dict[str, str], list[str]]] = {}
    jobs = {name: [f"{name}: ", *words] for name, (_, words) in JOBS_TOML.items()} | ODD_JOBS
    for name, words in jobs.items():
        found[name] = (["train", name, "--strategy", "ddp"], {}, words)
    for name, (_, words) in DS_CONFIGS.items():
        setting = f"strategy.zero2.ds_config={name}.json"
        command = ["train", LINEAR, "--strategy", "zero2", "--set", setting]
        found[name] = (command, {}, [f"ds_config = '{name}.json'", *words])
    for name, (strategy, environ, words) in LAUNCHERS.items():
        found[name] = (["train", LINEAR, "--strategy", strategy], environ, words)
    files = {name: words for name, (_, words) in LAUNCH_FILES.items()} | ODD_LAUNCH_FILES
    for name, words in files.items():
        file = f"launch/{name}"
        found[f"doctor {file}"] = (["doctor", file], {}, [f"hybrid: {file}: ", *words])
    return found


CASES = cases()
FILES = len(ACCELERATE_FILES) + len(HOSTFILES) + len(DEEPSPEED_FILES) + len(ODD_LAUNCH_FILES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed, with all the files."""
    path = tmp_path_factory.mktemp("malformed")
    for name, (content, _) in JOBS_TOML.items():
        (path / name).write_bytes(content)
    for name, (text, _) in DS_CONFIGS.items():
        (path / f"{name}.json").write_text(text)
    (path / "linear.toml").write_text(JOB)
    make_launch_files(path / "launch")
    (path / "loop.toml").symlink_to("loop2.toml")
    (path / "loop2.toml").symlink_to("loop.toml")
    (path / "self.toml").symlink_to("self.toml")
    (path / "dangling.toml").symlink_to("gone.toml")
    make_no_files(path, "folder.toml", "pipe.toml", ("sparse.toml", "sparse.json"))
    return path


def make_no_files(path: Path, folder: str, pipe: str, sparse: tuple[str, str]) -> None:
    """What is no file, and files that look as large as no disk."""
    (path / folder).mkdir()
    os.mkfifo(path / pipe)
    for name in sparse:
        with (path / name).open("wb") as file:
            file.truncate(2**40)


def make_launch_files(path: Path) -> None:
    """The same for launchers."""
    path.mkdir()
    for name, (content, _) in LAUNCH_FILES.items():
        (path / name).write_bytes(content)
    (path / "loop").symlink_to("loop.yaml")
    (path / "loop.yaml").symlink_to("loop")
    make_no_files(path, "folder.yaml", "pipe.json", ("sparse", "sparse.yaml"))


def environment() -> dict[str, str]:
    """This process's, without what a launcher would have set."""
    words = ("RANK", "WORLD_SIZE", "LOCAL_", "OMPI_", "PMI_", "SLURM_", "ACCELERATE_", "HYBRID_")
    return {key: value for key, value in os.environ.items() if not key.startswith(words)}


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """How each case ended."""
    asked = [{"words": words, "environ": environ} for words, environ, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-m", "tests._malformed_worker"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


def assert_one_line(status: int, stdout: str, stderr: str, words: list[str]) -> None:
    """2, nothing on stdout, one printable line on stderr with these words."""
    assert (status, stdout) == (2, ""), stderr[-2000:]
    (line,) = stderr.splitlines()
    assert line.startswith("hybrid: ") and line.isprintable() and len(line) < 1000, line
    assert not [word for word in words if word not in line], line


def test_there_are_eighty() -> None:
    assert len(CASES) == len(JOBS_TOML) + len(ODD_JOBS) + len(DS_CONFIGS) + len(LAUNCHERS) + FILES
    assert len(CASES) >= 80 and min(len(ACCELERATE_FILES), len(HOSTFILES)) > 20


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_line_without_torch(
    name: str, results: dict[str, dict[str, Any]]
) -> None:
    found = results[name]
    assert_one_line(found["status"], found["stdout"], found["stderr"], CASES[name][2])
    assert found["heavy"] == []
    assert found["cpu_s"] < CPU_S / 2, "the other half is for starting Python"


@pytest.mark.parametrize("name", TYPED)
def test_as_it_is_typed(name: str, folder: Path) -> None:
    words, environ, expected = CASES[name]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "hybrid", *words, *(["--out", "results"] * (words[0] == "train"))],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env=environment() | environ,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert_one_line(done.returncode, done.stdout, done.stderr, expected)
    assert not (folder / "results").exists()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_S


def test_a_byte_order_mark_is_no_mistake(folder: Path) -> None:
    (folder / "bom.toml").write_bytes(b"\xef\xbb\xbf" + JOB.encode())
    done = hybrid_command("train", str(folder / "bom.toml"), "--strategy", "dpd", timeout=60)
    assert_one_line(done.returncode, done.stdout, done.stderr, ["'dpd'", "single, ddp"])


def test_compare_checks_files_as_early(folder: Path) -> None:
    setting = f"strategy.zero2.ds_config={folder}/another stage.json"
    command = ["compare", LINEAR, "--strategies", "ddp,zero2", "--set", setting]
    done = hybrid_command(*command, "--out", str(folder / "results"), timeout=60)
    assert_one_line(done.returncode, done.stdout, done.stderr, ["stage = 3", "needs 2"])
    assert not (folder / "results").exists()
