"""`hybrid doctor FILE...`: judges what is handed to launchers, and starts nothing. No torch.

A .yaml or .yml is a configuration of accelerate. A .json is one of accelerate too where it has a
key that only accelerate's have, else one of DeepSpeed. Any other file is a hostfile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..config import JobError
from ..strategies._ds_config import STAGES, stage_of
from ..user_files import read_json, read_text, show
from .accelerate_files import Trap, count, judge_config
from .accelerate_files import judge as judge_accelerate
from .finding import Finding

ONLY_ACCELERATE = ("compute_environment", "distributed_type")
MAX_HOSTFILE = 2**16  # a thousand hosts
MOST_SLOTS = 4096  # deepspeed makes a list of as many numbers
# What deepspeed and Open MPI read alike. Of a line that goes on, deepspeed drops the rest in
# silence: `slots=2x` is 2 to it.
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._@:-]*)[ \t]+slots=([0-9]{1,9})[ \t]*(?:#.*)?")


def judge(files: Iterable[Path]) -> Iterator[Finding]:
    """What each file would start, then a warning for each value that does other than it seems to.
    JobError for the first that is malformed."""
    for file in files:
        found, traps = _judge(file, str(file))
        yield Finding(str(file), "ok", found)
        for trap, mend in traps:
            yield Finding(str(file), "warning", trap, mend)


def _judge(file: Path, where: str) -> tuple[str, list[Trap]]:
    if file.suffix.lower() in (".yaml", ".yml"):
        return judge_accelerate(file, where)
    if file.suffix.lower() != ".json":
        return _hostfile(read_text(file, where, MAX_HOSTFILE), where), []
    config = read_json(file, where)
    if isinstance(config, dict) and any(key in config for key in ONLY_ACCELERATE):
        return judge_config(config, where)
    return _deepspeed(stage_of(config, where)), []


def _deepspeed(stage: int) -> str:
    takers = [name for name, wanted in STAGES.items() if wanted == stage]
    if stage in (0, 1):
        takers.append(f"2d with strategy.2d.zero_stage = {stage}")
    return f"DeepSpeed configuration: ZeRO {stage}; for {' and '.join(takers)}"


def _hostfile(text: str, where: str) -> str:
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            valid = "HOST slots=N (any file but .yaml, .yml and .json is read as a hostfile)"
            raise JobError(f"{where}: line {number} = {show(line)}: valid: {valid}")
        host, slots = match[1], int(match[2])
        if host in hosts:
            raise JobError(f"{where}: line {number}: {show(host)} stands twice; valid: once")
        if not 1 <= slots <= MOST_SLOTS:
            valid = f"1 to {MOST_SLOTS}"
            raise JobError(f"{where}: line {number}: slots = {slots} of {host}: valid: {valid}")
        hosts[host] = slots
    if not hosts:
        raise JobError(f"{where}: names no host; valid: a line a host: HOST slots=N")
    named = ", ".join(f"{host} {slots}" for host, slots in list(hosts.items())[:8])
    more = ", ..." if len(hosts) > 8 else ""
    many = f"{count(len(hosts), 'host')}, {count(sum(hosts.values()), 'process')}"
    return f"hostfile: {many}: {named}{more}"
