"""Is a rank that notes what saving and loading a checkpoint take of it, for `checkpoint_speed`.

Each save and load adds a line of JSON to the file named by PROBE, with the rank's number added: the
seconds, and by how much the process's resident memory (VmHWM of /proc) rose above what it was. So
does each wait for a snapshot's copy before an optimizer step: the seconds alone."""

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


def noted(what: str, function: Callable[..., Any], memory: bool = True) -> Callable[..., Any]:
    """Return a function that does the same and notes what it took.

    memory: left out where to look at it takes time in which something else goes on."""

    def call(*arguments: Any, **options: Any) -> Any:
        before = resident("VmRSS") if memory else 0
        if memory:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        begun = time.monotonic()
        result = function(*arguments, **options)
        line: dict[str, Any] = {"what": what, "seconds": time.monotonic() - begun}
        if memory:
            line["extra_bytes"] = resident("VmHWM") - before
        with Path(f"{os.environ[PROBE]}.{os.environ['RANK']}").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    return call


if __name__ == "__main__":
    from hybrid.checkpoint.writer import Writer
    from hybrid.training import checkpointing
    from hybrid.training.checkpointing import Checkpoints

    Checkpoints.save = noted("save", Checkpoints.save)  # type: ignore[method-assign]
    Writer.wait_for_copy = noted(  # type: ignore[method-assign]
        "copy", Writer.wait_for_copy, memory=False
    )
    # Once the optimizer's state is there, which belongs to the rank's shard.
    checkpointing.load = noted("load", checkpointing.load)
    from hybrid.cli import main

    main()
