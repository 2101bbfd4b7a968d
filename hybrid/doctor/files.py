"""Checks files that launchers are handed (`hybrid doctor FILE...`), and starts nothing.

A .yaml or .yml is a configuration of accelerate. A .json is one of accelerate too where it has a
key that only accelerate's have, else one of DeepSpeed. Any other file is a hostfile."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ..engines.deepspeed_config import STAGES, stage_of
from ..job.errors import JobError
from ..job.reading import read_json, read_text, show, show_key
from .accelerate_files import Trap, check_config
from .finding import Finding, count

ONLY_ACCELERATE = {"compute_environment", "distributed_type"}
MAX_BYTES = 2**16  # a thousand hosts, or more than anyone configures by hand
MAX_VALUES = 2000  # of YAML; PyYAML needs some 50 us for each
MAX_LEVELS = 8
MOST_SLOTS = 4096  # deepspeed makes a list of as many numbers
# What deepspeed and Open MPI read alike. Of a line that goes on, deepspeed drops the rest in
# silence: `slots=2x` is 2 to it.
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._@:-]*)[ \t]+slots=([0-9]{1,9})[ \t]*(?:#.*)?")


def check_files(files: Iterable[Path]) -> Iterator[Finding]:
    """Yield what each file would start, and a warning for each value that does something else.

    Raises JobError for the first file that is malformed."""
    for file in files:
        found, traps = check_file(file)
        yield Finding(str(file), "ok", found)
        for trap, mend in traps:
            yield Finding(str(file), "warning", trap, mend)


def check_file(file: Path) -> tuple[str, list[Trap]]:
    """Return what a file would start, in words, and its traps; raise JobError if malformed."""
    where, ending = str(file), file.suffix.lower()
    if ending in (".yaml", ".yml"):
        return check_config(read_yaml(file, where), where)
    if ending != ".json":
        return _check_hostfile(read_text(file, where, MAX_BYTES), where), []
    config = read_json(file, where)
    if isinstance(config, dict) and ONLY_ACCELERATE & config.keys():
        return check_config(config, where)
    stage = stage_of(config, where)
    takers = [name for name, wanted in STAGES.items() if wanted == stage]
    if stage in (0, 1):
        takers.append(f"2d with strategy.2d.zero_stage = {stage}")
    return f"DeepSpeed configuration: ZeRO {stage}; for {' and '.join(takers)}", []


class _PlainLoader(yaml.SafeLoader):
    """Refuses tags, anchors and equal keys while it reads, so that nothing large is built first.

    Aliases can name one value a million times, and YAML keeps only the last of two equal keys."""

    levels = values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.values += 1
        if event.anchor is not None:
            _refuse("an anchor or an alias (& or *) may not be used", event)
        if event.tag is not None:
            _refuse(f"a tag may not be used: {show_key(event.tag)}", event)
        if self.values > MAX_VALUES or self.levels == MAX_LEVELS:
            _refuse(f"more than {MAX_VALUES} values or {MAX_LEVELS} levels", event)
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = set()
        for key, _ in node.value:
            if key.tag != self.DEFAULT_SCALAR_TAG:  # `<<`, which merges a mapping, has another too
                _refuse("a key is no text", key)
            if key.value in found:
                _refuse(f"{show(key.value)} stands twice in one mapping", key)
            found.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse(problem: str, at: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def read_yaml(path: Path, where: str) -> Any:
    """Return what a plain YAML file holds; raise JobError, beginning with `where`, otherwise."""
    text = read_text(path, where, MAX_BYTES)
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"line {line}: the character {error.character:#04x} may not be used"
    except yaml.MarkedYAMLError as error:
        found = f"line {error.problem_mark.line + 1}: {error.problem}"
        if error.context_mark:
            found += f", {error.context} in line {error.context_mark.line + 1}"
    except ValueError as error:  # an impossible date, or a number of thousands of digits
        found = str(error)
    raise JobError(f"{where}: not a plain YAML file: {found[:200]}")


def _check_hostfile(text: str, where: str) -> str:
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, text.split("\n")), 1):
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
            wrong = f"line {number}: slots = {slots} of {host}"
            raise JobError(f"{where}: {wrong}: valid: 1 to {MOST_SLOTS}")
        hosts[host] = slots
    if not hosts:
        raise JobError(f"{where}: names no host; valid: a line a host: HOST slots=N")
    named = ", ".join(f"{host} {slots}" for host, slots in list(hosts.items())[:8])
    more = ", ..." if len(hosts) > 8 else ""
    many = f"{count(len(hosts), 'host')}, {count(sum(hosts.values()), 'process')}"
    return f"hostfile: {many}: {named}{more}"
