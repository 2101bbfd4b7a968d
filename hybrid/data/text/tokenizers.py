"""This module turns text into token ids and back, by bytes or by a Hugging Face tokenizer.

`Bytes` needs nothing installed or downloaded. In both classes all ids are below `vocab_size`, and
the id `end` follows the tokens of each document."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from ...job.errors import JobError, first_line
from ...job.reading import require_plain, show
from ...launch.hushed import hushed

BYTES = "bytes"
# A bare tokenizer file does not say which token ends a text; these are the usual names.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
LARGE = 2**28  # bytes of a file
VALID = "bytes, a folder, a tokenizer.json, a hub name"
# A folder may hold a model's weights too; files with these suffixes make up the tokenizer.
SUFFIXES = (".json", ".txt", ".model", ".tiktoken")


class Bytes:
    """Uses the 256 values of a byte as ids, and 256 as the end."""

    vocab_size = 257
    end = 256

    def encode(self, text: bytes) -> numpy.ndarray:
        """Returns the ids of UTF-8 text, whole characters, without special tokens around them."""
        return numpy.frombuffer(text, numpy.uint8)

    def encode_all(self, texts: Sequence[bytes]) -> list[numpy.ndarray]:
        """Returns the ids of each of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, with U+FFFD for what is not UTF-8, such as half a character."""
        return bytes(i for i in ids if i != self.end).decode(errors="replace")


class HuggingFace:
    """Uses a tokenizer of transformers; a special token that a text spells out counts as one."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self.end = tokenizer, end
        self._backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)

    def encode(self, text: bytes) -> numpy.ndarray:
        """Returns the ids of UTF-8 text, as `Bytes.encode` does."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[bytes]) -> list[numpy.ndarray]:
        """Returns the ids of each of several texts.

        The tokenizers library shares a batch out to threads on the cores that this process may use,
        unless TOKENIZERS_PARALLELISM or RAYON_NUM_THREADS says otherwise."""
        decoded = [text.decode() for text in texts]
        if self._backend is not None:  # it makes no offsets, masks and texts of tokens
            every = self._backend.encode_batch_fast(decoded, add_special_tokens=False)
            return [numpy.array(found.ids, numpy.int64) for found in every]
        encode = self._tokenizer.encode
        each = (encode(text, add_special_tokens=False, verbose=False) for text in decoded)
        return [numpy.array(ids, numpy.int64) for ids in each]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._tokenizer.decode(
            [i for i in ids if i != self.end], clean_up_tokenization_spaces=False
        )


Tokenizer = Bytes | HuggingFace


def files_of(name: str) -> list[Path]:
    """Lists the local files that make up a tokenizer; `bytes` and hub names have none.

    Raises ValueError where the name means a local file or folder that does not exist, or that has
    what cannot be read to an end."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"tokenizer = {show(name)}: is no name; valid: {VALID}")
    if name == BYTES:
        return []
    try:
        path = Path(name).expanduser()
        if path.is_file():
            require_plain(path, LARGE)
            return [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and not p.is_dir())
            for file in found:
                require_plain(file, LARGE)
            return found
    except (OSError, RuntimeError, JobError) as error:  # RuntimeError: a user has no such home
        words = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"tokenizer = {show(name)}: {words}") from None
    if path.suffix == ".json" or path.is_absolute() or name[:1] in "~." or name.count("/") > 1:
        raise ValueError(f"tokenizer = {name!r}: no such file or folder")
    return []


def load_tokenizer(name: str) -> Tokenizer:
    """Loads a tokenizer: `bytes`, a local folder, a tokenizer.json or a hub name.

    A hub name may ask the hub. Raises ValueError where the tokenizer cannot be loaded or names no
    end of a text."""
    if name == BYTES:
        return Bytes()
    files_of(name)  # refuses what is missing
    import transformers

    path = Path(name).expanduser()
    try:
        with hushed() if path.exists() else contextlib.nullcontext():
            loaded = _load(transformers, name, path)
            if not loaded.get_vocab():
                raise ValueError("it has no tokens")
    except Exception as error:  # the libraries raise many kinds, of many lines
        raise ValueError(
            f"tokenizer = {name!r}: cannot be loaded: {first_line(error)}; valid: {VALID}"
        ) from None
    return HuggingFace(loaded, _end_of(loaded, name))


def _load(transformers: Any, name: str, path: Path) -> Any:
    if path.is_file():
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    source = str(path) if path.is_dir() else name
    return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)


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
