"""Has ways to damage a file, and JSON values in place of others, that several kinds of case use."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import MINE
from .grounds import Bomb

Damage = Callable[[Path, random.Random], None]


def _replaced(content: bytes) -> Damage:
    def do(path: Path, draw: random.Random) -> None:
        path.write_bytes(content)

    return do


def _cut(path: Path, draw: random.Random) -> None:
    held = path.read_bytes()
    path.write_bytes(held[: draw.randrange(1, max(2, len(held)))])


def _flip(path: Path, draw: random.Random) -> None:
    held = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 3, 30])):
        held[draw.randrange(len(held))] ^= 1 << draw.randrange(8)
    path.write_bytes(held)


def _longer(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.choice([1, 100])))


def _linked(target: str) -> Damage:
    def do(path: Path, draw: random.Random) -> None:
        path.unlink()
        path.symlink_to(target or path.name)

    return do


def _pipe(path: Path, draw: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)
    (path / "mine.txt").write_text(MINE)


def _sparse(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(2**42)


def _bomb(path: Path, draw: random.Random) -> None:
    path.write_bytes(pickle.dumps(Bomb(), protocol=draw.choice([0, 2, 4])))


# In words: what is done to any file.
ANY: dict[str, Damage] = {
    "is gone": lambda path, draw: path.unlink(),
    "is empty": _replaced(b""),
    "is cut": _cut,
    "has flipped bits": _flip,
    "has bytes behind": _longer,
    "is a pipe": _pipe,
    "is a folder": _folder,
    "is a link to itself": _linked(""),
    "is a link to nothing": _linked("/nonexistent/file"),
    "is a link to /dev/zero": _linked("/dev/zero"),
    "is a link to another's file": _linked("../mine.txt"),
    "is a pickle": _bomb,
    "is huge and sparse": _sparse,
    "is zeros": _replaced(b"\0" * 4096),
    "is a zip": _replaced(b"PK\x03\x04" + b"a" * 60),
}
# What is written in place of a file of JSON.
TEXTS: dict[str, bytes] = {
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 50_000,
    "null": b"null",
    "a list": b"[]",
    "a number": b"7",
    "a text": b'"text"',
    "no keys": b"{}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a key twice": b'{"sha256": "a", "sha256": "b", "model": {}, "model": {}}',
    "NaN": b'{"step": NaN, "model": Infinity}',
    "digits": b'{"step": ' + b"9" * 5000 + b"}",
    "a comment": b"{ // mine\n}",
    "NUL": b'{"a": 1}\0',
    "a lone surrogate": b'{"model": {"name": "\\ud800"}}',
    "ten megabytes": b'{"a": "' + b"x" * 10**7 + b'"}',
    "a control character": b'{"model": {"name": "\\u001b[31mred"}}',
}
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 10**30, 1.5, float("nan"), "", "text", "x" * 10**6, [], {}, [[]],
    "../../mine.txt",
    "/etc/passwd", "\x1b[31mred\n", "\ud800", ["a", 1], {"a": {"b": []}}, "os:system", -(2**63),
    "NaN",
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value."""
    found = [path] if path else []
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in inside:
        found += places(inner, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    """Put a value at a path."""
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def mutate(value: Any, draw: random.Random) -> str:
    """Change one thing inside a JSON value, and say in words which."""
    path = draw.choice(places(value))
    shown = ".".join(map(str, path))[-60:]
    how = draw.randrange(4)
    if how == 0:
        inner = value
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return f"{shown} is gone"
    new = draw.choice(ODD_VALUES)
    put(value, path, new)
    return f"{shown} = {ascii(new)[:30]}"


def mutate_file(path: Path, draw: random.Random) -> str:
    """Change one thing in a file of JSON."""
    value = json.loads(path.read_text())
    words = mutate(value, draw)
    path.write_text(json.dumps(value))
    return words
