"""Is a rank that notes what saving and loading a checkpoint take of it, for `checkpoint_speed`.

Each save and load adds a line of JSON to the file named by PROBE, with the rank's number added: the
seconds, and by how much the process's resident memory (VmHWM of /proc) rose above what it was."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROBE = "CHECKPOINT_PROBE"  # the variable that names the file


def resident(field: str) -> int:
    """Return a field of this process's status in bytes: VmRSS now, VmHWM at most."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * 1024


def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same and notes what it took."""

    def call(*arguments: Any, **options: Any) -> Any:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        begun = time.monotonic()
        result = function(*arguments, **options)
        seconds, peak = time.monotonic() - begun, resident("VmHWM")
        line = {"what": what, "seconds": seconds, "extra_bytes": peak - before}
        with Path(f"{os.environ[PROBE]}.{os.environ['RANK']}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    return call


if __name__ == "__main__":
    from hybrid.training import checkpointing
    from hybrid.training.checkpointing import Checkpoints

    Checkpoints.save = noted("save", Checkpoints.save)  # type: ignore[method-assign]
    # Once the optimizer's state is there, which belongs to the rank's shard.
    checkpointing.load = noted("load", checkpointing.load)
    from hybrid.cli import main

    main()
