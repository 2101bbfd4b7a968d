"""Limits the memory of a rank, then runs the command: `limited.py BYTES SPARED ...`.

BYTES come on top of what the process holds once its libraries are loaded. The kernel refuses what
passes the limit (RLIMIT_DATA of setrlimit(2): heap, private mappings, stacks), and torch raises as
it does on a host that has no more. The strategy SPARED is not limited: the reference for the rest.
"""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

STACK = 2**20  # bytes; gloo's twenty threads have 8 MiB each otherwise, which count in full


def shrink_stacks() -> None:
    """Give threads that start from now on small stacks (pthread_setattr_default_np(3))."""
    libc, attributes = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_attr_init(attributes)
    libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(STACK))
    if libc.pthread_setattr_default_np(attributes):
        raise OSError("pthread_setattr_default_np")


def return_freed_memory() -> None:
    """Have glibc give back what is freed (mallopt(3)), so that what counts is what is in use."""
    libc = ctypes.CDLL(None)
    mmap_threshold, trim_threshold, arena_max = -3, -1, -8
    libc.mallopt(mmap_threshold, 2**16)
    libc.mallopt(trim_threshold, 2**16)
    libc.mallopt(arena_max, 1)


def impose(limit: int) -> None:
    """Allow `limit` bytes more than what is held when all that a run imports is there."""
    import accelerate  # noqa: F401
    import deepspeed.pipe  # noqa: F401
    import torch._dynamo  # noqa: F401

    import hybrid.training.loop  # noqa: F401

    limit_memory(limit)


def limit_memory(more: int) -> None:
    """Allow this process `more` bytes beside what it holds."""
    (kib,) = re.findall(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(kib) * 1024 + more, hard))


if __name__ == "__main__":
    shrink_stacks()
    limit, spared = int(sys.argv.pop(1)), sys.argv.pop(1)
    return_freed_memory()
    if spared not in sys.argv:
        impose(limit)
    from hybrid.cli import main

    main()
