"""What the doctor says about one thing, and how it runs other programs to find out."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from typing import Literal

Status = Literal["ok", "warning", "error"]
PROGRAM_S = 5.0  # what another program may take to name its version


@dataclasses.dataclass(frozen=True)
class Finding:
    """`found` in words; `mend` says what to do about it, None where nothing is to be done. An
    `error` is something needed that is missing or does not work; a `warning` costs time or gets in
    the way of some runs."""

    name: str
    status: Status
    found: str
    mend: str | None = None


def run_program(command: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a program ends well within five seconds, and what it prints, on both streams, without
    empty lines."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROGRAM_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, [str(error)]
    text = done.stdout.decode(errors="replace")
    return done.returncode == 0, [line.strip() for line in text.splitlines() if line.strip()]
