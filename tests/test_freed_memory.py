"""Ranks that shard a large model give back what they free."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hybrid.launch.freed_memory import LEAST

HELD = """
import sys
from pathlib import Path
from hybrid.launch.freed_memory import returned_when_freed

def held() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024

MIB = 2**20
large = bytearray(31 * MIB)
del large  # glibc lays blocks up to 31 MiB on the heap from now on
before = held()
freed, kept = zip(*((bytearray(3 * MIB), bytearray(2**17)) for _ in range(20)))
with returned_when_freed(int(sys.argv[1]), int(sys.argv[2])):
    del freed
first = held() - before
# Larger ones, which do not fit where those were.
freed, others = zip(*((bytearray(4 * MIB), bytearray(2**17)) for _ in range(20)))
assert held() - before > 75
del freed
print(first, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told")
@pytest.mark.parametrize(
    ("parameters", "shards", "returns"), [(LEAST, 2, True), (LEAST, 1, False), (999, 4, False)]
)
def test_blocks_between_others_are_given_back(parameters: int, shards: int, returns: bool) -> None:
    command = [sys.executable, "-c", HELD, str(parameters), str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    assert (first < 20) is returns and (second < 25) is returns, (first, second)
