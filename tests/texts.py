"""What the tests of text share: small texts, and the blocks of a side put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hybrid.data.text import Blocks, text
from hybrid.data.text.tokenizers import Bytes

END = Bytes.end
WORDS = "alpha beta gamma delta été 東京 epsilon\n"


def read(folder: Path, **options: Any) -> tuple[Blocks, Blocks]:
    """`text` in blocks of 16, its cache in a folder of the test's own."""
    return text(**{"context": 16, "cache": str(folder / "cache")} | options)


def tokens_of(blocks: Blocks) -> list[int]:
    """The tokens of a side, put together again from what a model is given."""
    inputs, targets = zip(*blocks, strict=True)
    flat, following = torch.cat(inputs), torch.cat(targets)
    counted = int((following != -100).sum())
    assert (following[counted:] == -100).all() and counted == blocks.num_tokens
    assert flat[1:counted].equal(following[: counted - 1])
    return [int(flat[0]), *following[:counted].tolist()]


def documents_of(blocks: Blocks) -> list[bytes]:
    """The documents of a side of bytes, in order."""
    first, *rest = tokens_of(blocks)
    assert (first, rest[-1]) == (END, END)
    documents: list[list[int]] = [[]]
    for token in rest:
        if token == END:
            documents.append([])
        else:
            documents[-1].append(token)
    return [bytes(d) for d in documents[:-1]]


def write_files(folder: Path, texts: dict[str, str]) -> str:
    """Files of these texts; returns the folder's path."""
    for name, words in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(words)
    return str(folder)


def many(folder: Path, number: int = 40) -> str:
    """A folder of files of different texts and lengths."""
    return write_files(folder, {f"{i:03}.txt": f"{i} {WORDS * (i % 7 + 1)}" for i in range(number)})
