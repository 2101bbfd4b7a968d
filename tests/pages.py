"""The commands of the launchers' pages, and how each is to be run.

A block's fence says it: `bash`, one command after the other; `bash at once`, one on each host, all
at the same time; `bash needs PROGRAM`; `bash in SLURM`; `bash over ssh`, on the first of hosts that
ssh reaches.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import ROOT
from tests.ports import free_port

PAGES = sorted((ROOT / "launch").glob("*.md"))


class Block(NamedTuple):
    """Commands of a page. `how`: what follows `bash` on the fence."""

    page: str
    how: str
    commands: list[str]


def blocks() -> list[Block]:
    """All blocks of commands in all pages."""
    found = []
    for page in PAGES:
        for how, text in re.findall(r"^```bash *(.*)\n((?s:.*?))^```$", page.read_text(), re.M):
            lines = text.replace("\\\n", "").splitlines()
            found.append(
                Block(page.stem, how, [line for line in lines if not line.startswith("#")])
            )
    return found


def environment(folder: Path, **more: str) -> dict[str, str]:
    """For commands typed in `folder`: the checkout's files and programs, a free port, `more`."""
    if not (folder / "launch").exists():
        (folder / "launch").symlink_to(ROOT / "launch")
    ours = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
    }
    return os.environ | ours | more


def run_at_once(commands: list[str], folder: Path, environ: dict[str, str]) -> str:
    """Run shell commands together in `folder`; what they print. AssertionError where one fails, or
    takes longer than two minutes; none is left running."""
    log = folder / "output.txt"
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("a"))
        started = []
        for command in commands:
            process = subprocess.Popen(
                ["bash", "-c", command], cwd=folder, env=environ, stdout=output, stderr=output
            )
            stack.callback(_end, process)
            started.append(process)
        deadline = time.monotonic() + 120
        while any(process.poll() is None for process in started):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert [process.returncode for process in started] == [0] * len(started), log.read_text()
    return log.read_text()


def record_of(folder: Path) -> dict[str, Any]:
    """The one record that commands left in `folder`."""
    (file,) = folder.glob("out/*/record.json")
    return json.loads(file.read_text())


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()  # a launcher: its ranks end with it
        process.wait()
