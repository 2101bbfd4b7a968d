"""What a rank does for the process that started it: leaves its error, and ends with it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from .config import JobError


def leave_error(error: BaseException) -> None:
    """Write what this rank died of, for `hybrid.launch.first_cause`."""
    folder, rank = os.environ.get("HYBRID_LOGS"), os.environ.get("RANK", "0")
    if not folder:
        return
    what: dict[str, Any] = {
        "time": time.time(),
        "message": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        "details": "".join(traceback.format_exception(error)),
        "is_job": isinstance(error, JobError),
    }
    if what["is_job"]:
        what["message"] = str(error)
    path = Path(folder) / f"rank{rank}.error.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(what))
    os.replace(part, path)


def end_with_parent() -> None:
    """Have the kernel end this rank when the process that started it is gone (Linux; nothing
    elsewhere). A launcher that is killed leaves no one to do it."""
    parent = os.environ.get("HYBRID_PARENT")
    if parent is None or sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)
