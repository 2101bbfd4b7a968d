"""Text to token ids and back: by bytes, which needs nothing, or by a Hugging Face tokenizer.

A document's tokens are followed by the tokenizer's end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

BYTES = "bytes"
# What bare tokenizer files, which do not say it, call the end of a text.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
# What a tokenizer consists of in a folder that may hold a model's weights too.
SUFFIXES = (".json", ".txt", ".model", ".tiktoken")


class Tokenizer(Protocol):
    """`vocab_size`: ids are below it. `end`: the id that ends a document."""

    vocab_size: int
    end: int

    def encode(self, text: bytes) -> numpy.ndarray:
        """Ids of UTF-8 text, whole characters, without special tokens around them."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...


class Bytes:
    """The 256 values of a byte, and 256 for the end."""

    vocab_size = 257
    end = 256

    def encode(self, text: bytes) -> numpy.ndarray:
        """See `Tokenizer`."""
        return numpy.frombuffer(text, numpy.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        return bytes(i for i in ids if i != self.end).decode(errors="replace")


class HuggingFace:
    """A tokenizer of transformers. A special token that is spelt out in a text is taken as such."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self.end = tokenizer, end
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)

    def encode(self, text: bytes) -> numpy.ndarray:
        """See `Tokenizer`."""
        ids = self._tokenizer.encode(text.decode(), add_special_tokens=False, verbose=False)
        return numpy.array(ids, numpy.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.decode(
            [i for i in ids if i != self.end], clean_up_tokenization_spaces=False
        )


def files_of(name: str) -> list[Path]:
    """The local files that make up a tokenizer; none for the bytes or a hub's. ValueError where a
    local one was meant and is not there."""
    path = Path(name).expanduser()
    if name == BYTES:
        return []
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if path.suffix == ".json" or path.is_absolute() or name[:1] in "~." or name.count("/") > 1:
        raise ValueError(f"tokenizer = {name!r}: no such file or folder")
    return []


def load_tokenizer(name: str) -> Tokenizer:
    """The bytes, or the tokenizer of a local folder, a tokenizer.json or a hub name (which may ask
    the hub). ValueError where it cannot be loaded or names no end of a text."""
    if name == BYTES:
        return Bytes()
    path = Path(name).expanduser()
    files_of(name)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded: Any
    try:
        if path.is_file():
            loaded = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            source = str(path) if path.is_dir() else name
            loaded = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the libraries raise many kinds, of many lines
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"tokenizer = {name!r}: cannot be loaded: {reason}; valid: bytes, a folder, a "
            "tokenizer.json, a hub name"
        ) from None
    return HuggingFace(loaded, _end_of(loaded, name))


def _end_of(tokenizer: Any, name: str) -> int:
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    known = tokenizer.get_vocab()
    for token in END_TOKENS:
        if token in known:
            return int(known[token])
    raise ValueError(
        f"tokenizer = {name!r}: names no end of a text; valid: one with an eos_token, or with one "
        f"of {', '.join(END_TOKENS)}"
    )
