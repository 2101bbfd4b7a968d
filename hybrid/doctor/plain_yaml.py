"""Reads YAML of plain values only: no tags, no anchors, no key twice, little of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..config import JobError
from ..user_files import read_text, show, show_key

MAX_BYTES = 2**16
# Of a configuration written by hand. PyYAML takes some 50 us a value: more would be noticed.
MAX_VALUES = 2000
MAX_LEVELS = 8
_TEXT = "tag:yaml.org,2002:str"


class _PlainLoader(yaml.SafeLoader):
    """Refuses while it reads, so that nothing large is built before: aliases can name a value a
    million times, and of a key that stands twice YAML would drop one in silence."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.levels = self.values = 0

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
            if key.tag != _TEXT:  # also `<<`, which takes in another mapping
                _refuse("a key is no text", key)
            if key.value in found:
                _refuse(f"{show(key.value)} stands twice in one mapping", key)
            found.add(key.value)
        return super().construct_mapping(node, deep)


def _refuse(problem: str, at: Any) -> None:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; `what` names it in errors. JobError where `read_text` raises it,
    where it is no YAML, and where it holds other than plain values."""
    text = read_text(path, what, MAX_BYTES)
    try:
        return _PlainLoader(text).get_single_data()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"line {line}: the character {error.character:#04x} may not be used"
    except yaml.MarkedYAMLError as error:
        found = f"line {error.problem_mark.line + 1}: {error.problem}"
        if error.context_mark:
            found += f", {error.context} in line {error.context_mark.line + 1}"
    except ValueError as error:  # a date that is none, thousands of digits
        found = str(error)
    raise JobError(f"{what}: not a plain YAML file: {found[:200]}")
