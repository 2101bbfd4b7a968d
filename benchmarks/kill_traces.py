"""Says what a killed command has left: processes, half files, files in a temporary folder.

It reads the files with the standard library alone, so that no reader of ours passes over what is
wrong with one."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENDING_S = 8.0  # in which the kernel has ended what the killed process started
OF_TORCH = "torchinductor_"  # a cache of compiled code, which torch makes when it is imported


def processes_of(out: Path, rank: int | None = None) -> Iterator[tuple[int, list[str]]]:
    """Yield the process id and words of what runs for a folder or for one in it.

    rank: of ranks with this number alone."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            mine = any(Path(word).is_relative_to(out) for word in words if word)
            if not mine or (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            if rank is not None and not _is_rank(int(entry.name), words, rank):
                continue
        except (OSError, ValueError):
            continue
        yield int(entry.name), words


def _is_rank(pid: int, words: list[str], rank: int) -> bool:
    """Tell whether a process writes the log of a rank: a fork shows no variables of its own."""
    if "--parent" not in words:
        return False
    return Path(os.readlink(f"/proc/{pid}/fd/2")).name == f"rank{rank}.log"


def left_in(out: Path) -> list[str]:
    """Return the command lines of what still runs after a moment to end."""
    deadline = time.monotonic() + ENDING_S
    while (left := list(processes_of(out))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [" ".join(words) for _, words in left]


def owners(temporary: Path) -> list[str]:
    """Return what lies in a temporary folder, but for torch's own cache."""
    names = sorted(path.name for path in temporary.iterdir())
    return [name for name in names if not name.startswith(OF_TORCH)]


def read_result(out: Path) -> dict[str, Any]:
    """Return what tells one comparison from another, empty where there is none."""
    try:
        found = json.loads((out / "compare.json").read_bytes())
    except FileNotFoundError:
        return {}
    named = found["strategies"].items()
    runs = sorted(name for name, run in named if run["world_size"])
    failed = sorted(name for name, run in named if run["status"] == "failed")
    date = found["machine"].get("date")
    return {"id": found.get("id"), "date": date, "runs": runs, "failed": failed}


def half_files(out: Path) -> list[str]:
    """Return what is wrong with the files in a results folder, by their names."""
    problems = []
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name.endswith(".part") or ".part" in str(path.parent):
            continue
        try:
            _check(path)
        except FileNotFoundError as error:
            problems.append(f"{path.relative_to(out)}: {Path(error.filename).name} is missing")
        except (ValueError, LookupError, AssertionError) as error:
            problems.append(f"{path.relative_to(out)}: {type(error).__name__}: {error}")
    return problems


def _check(path: Path) -> None:
    data = path.read_bytes()
    if path.name == "steps.jsonl":
        assert data.endswith(b"\n") or not data, "its last line is cut"
        assert all("loss" in json.loads(line) for line in data.splitlines())
    elif path.name == "compare.md":
        assert data.endswith(b"\n")
    elif path.name == "report.html":
        assert data.rstrip().endswith(b"</html>")
    elif path.name == "manifest.json":
        for name, stated in json.loads(data)["files"].items():
            _check_sum(path.with_name(name), stated["sha256"])
    elif path.name == "checkpoint.json" and "file" in json.loads(data):
        _check_sum(path.with_name(json.loads(data)["file"]), json.loads(data)["sha256"])
    elif path.suffix == ".json":
        assert json.loads(data), "is empty"
    elif path.name.startswith(".") or path.suffix not in (
        ".log",
        ".where",
        ".safetensors",
        ".lock",
    ):
        raise ValueError("is no file that a run leaves")


def _check_sum(path: Path, expected: str) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected, f"{path.name} is damaged"
