"""What commands say that are refused before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MAIN = """
import sys
from hybrid.cli import main
for words in COMMANDS:
    sys.argv = ["hybrid", *words]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, (words, end.code)
    assert "torch" not in sys.modules, words
"""


def lines_before_torch(
    commands: Sequence[list[str]], environment: Mapping[str, str], folder: Path | None = None
) -> list[str]:
    """The lines on stderr of commands, each of which must end with 2 and have imported no torch."""
    done = subprocess.run(
        [sys.executable, "-c", f"COMMANDS = {commands!a}\n{MAIN}"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()
