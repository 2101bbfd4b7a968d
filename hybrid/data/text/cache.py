"""This module keeps tokenised text in files, which every later run maps into memory.

A token file has a header (a line of JSON filled up to `HEADER` bytes), then the train tokens, then
the validation tokens. It appears whole or not at all, so that ranks that start together never see
a part of one. A lock, which ends with its process, lets one of them do the work.

A file is trusted under two conditions. Its sources must have the same `state` as when it was
written. Its size, its header's checksum and that of up to 32 MiB of its tokens must agree with the
header: all tokens of a file up to that size, evenly spaced pages of a larger one (this takes 0.02 s
at most, measured), and these have to be in the vocabulary. No secret goes into the sums: whoever
may write in the folder can put other tokens there, with sums that fit."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy
from filelock import FileLock

from ...launch.threads import num_cores
from ...records.whole import parts_of, whole_file
from .documents import LEFT_OUT, PIECE, Plan, cut, pieces
from .sources import Source
from .tokenizers import Tokenizer

HEADER = 4096
PAGE, CHECKED_PAGES = 1 << 16, 1 << 9
MOST_PIECES = 32  # at once; the tokens of one take some 10 MiB meanwhile
NOTE_S = 10.0  # seconds between two lines about the progress
ABANDONED_S = 24 * 3600  # without a lock: a part untouched for so long is of a killed process


@dataclasses.dataclass(frozen=True)
class Side:
    """Describes the tokens of one side and their text; `fingerprint` is their SHA-256."""

    num_tokens: int
    num_bytes: int
    num_documents: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Holds what a header says, and the tokens of both sides, mapped into memory."""

    vocab_size: int
    sides: tuple[Side, Side]
    tokens: tuple[numpy.ndarray, numpy.ndarray]


def open_tokens(path: Path, state: str, build: Callable[[Path], None]) -> TokenFile:
    """Opens the token file at `path` for this state of the sources.

    Where the file is missing, damaged or of another state, `build` writes it first. Raises OSError
    where it cannot be written."""
    found = _read(path, state)
    if found:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_suffix(".lock"))
    # On a file system without locks each process does the work, and the last one's file, of the
    # same bytes, stays.
    with contextlib.suppress(OSError, NotImplementedError):
        lock.acquire()
    try:
        found = _read(path, state)  # another process may have written it meanwhile
        if found is None:
            _remove_abandoned(path, 0.0 if lock.is_locked else ABANDONED_S)
            build(path)
            found = _read(path, state)
    finally:
        lock.release()
    if found is None:
        raise OSError(f"{path} does not hold what was just written")
    return found


def _read(path: Path, state: str) -> TokenFile | None:
    """Reads a token file; warns of a damaged one and returns None where there is nothing to use."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            if header["state"] != state:
                return None
            dtype = dtype_for(header["vocab_size"])
            sides = (Side(**header["train"]), Side(**header["validation"]))
            size = sum(side.num_tokens for side in sides) * dtype.itemsize
            if os.fstat(file.fileno()).st_size != HEADER + size:
                raise ValueError("its size is not what its header says")
            if _checksum(file, size) != header["pages"]:
                raise ValueError("its tokens are not those that were written")
            if _largest(file, size, dtype) >= header["vocab_size"]:
                raise ValueError("it has tokens that are not in the vocabulary")
            mapped = numpy.memmap(file, dtype, "r", HEADER)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path} is damaged ({error}) and is written anew", stacklevel=2)
        return None
    train, tokens = sides[0].num_tokens, numpy.asarray(mapped)
    return TokenFile(header["vocab_size"], sides, (tokens[:train], tokens[train:]))


def _read_header(file: IO[bytes]) -> dict[str, Any]:
    check, _, text = file.read(HEADER).partition(b" ")
    if hashlib.sha256(text).hexdigest().encode() != check:
        raise ValueError("its header is not what was written")
    return json.loads(text)


def _write_header(file: IO[bytes], header: dict[str, Any]) -> None:
    text = json.dumps(header).encode().ljust(HEADER - 66) + b"\n"
    file.seek(0)
    file.write(hashlib.sha256(text).hexdigest().encode() + b" " + text)


def _checksum(file: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    for page in _pages(file, size):
        digest.update(page)
    return digest.hexdigest()


def _pages(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yields all pages of the tokens, or `CHECKED_PAGES` of them from the first to the last."""
    num_pages = -(-size // PAGE)
    checked = min(num_pages, CHECKED_PAGES)
    for i in range(checked):
        file.seek(HEADER + PAGE * (i * (num_pages - 1) // max(1, checked - 1)))
        yield file.read(PAGE)


def _largest(file: IO[bytes], size: int, dtype: numpy.dtype) -> int:
    return max((int(numpy.frombuffer(page, dtype).max()) for page in _pages(file, size)), default=0)


class _SideWriter:
    """Writes one side's tokens, which begin with an end token.

    So each token of each document, its end token included, is a target once."""

    def __init__(self, file: IO[bytes], tokenizer: Tokenizer) -> None:
        self.file, self.tokenizer = file, tokenizer
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.num_tokens = self.num_bytes = self.num_documents = 0
        self.digest, self.noted = hashlib.sha256(), time.monotonic()
        self.waiting = list[bytes | None]()  # pieces that are tokenised together; None: an end
        self.waiting_bytes, self.together = 0, PIECE * min(2 * num_cores(), MOST_PIECES)
        self._put(numpy.array([tokenizer.end]))

    def add(self, chunks: Iterable[bytes]) -> None:
        """Tokenises one document, perhaps together with later ones."""
        for piece in pieces(chunks):
            self.num_bytes += len(piece)
            self.waiting.append(piece)
            self.waiting_bytes += len(piece)
            if self.waiting_bytes >= self.together:
                self.flush()
            if time.monotonic() - self.noted > NOTE_S:
                self.noted = time.monotonic()
                print(f"hybrid: tokenised {self.num_bytes / 1e6:.0f} MB of text", file=sys.stderr)
        self.num_documents += 1
        self.waiting.append(None)

    def flush(self) -> None:
        """Tokenises what waits."""
        found = iter(self.tokenizer.encode_all([p for p in self.waiting if p is not None]))
        for piece in self.waiting:
            self._put(numpy.array([self.tokenizer.end]) if piece is None else next(found))
        self.waiting, self.waiting_bytes = [], 0

    def _put(self, ids: numpy.ndarray) -> None:
        size = self.tokenizer.vocab_size
        if ids.size and int(ids.max()) >= size:
            raise ValueError(f"the tokenizer made token {ids.max()} of a vocabulary of {size}")
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.num_tokens += ids.size

    def summary(self) -> dict[str, Any]:
        """Returns what the header says about this side, the fields of `Side`."""
        counts = self.num_tokens, self.num_bytes, self.num_documents
        return dataclasses.asdict(Side(*counts, self.digest.hexdigest()))


def dtype_for(vocab_size: int) -> numpy.dtype:
    """Returns a little-endian type of two bytes where the ids fit, else of four."""
    return numpy.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_tokens(
    path: Path, state: str, sources: Sequence[Source], plan: Plan, tokenizer: Tokenizer
) -> None:
    """Tokenises the documents, each on the side that `plan` gives it, into a file at `path`.

    Memory does not grow with the text. Where it fails, no part of a file is left."""
    with whole_file(path) as train, tempfile.TemporaryFile(dir=path.parent) as validation:
        train.write(bytes(HEADER))
        writers = _SideWriter(train, tokenizer), _SideWriter(validation, tokenizer)
        _write_documents(sources, plan, writers)
        for writer in writers:
            writer.flush()
        if not all(writer.num_bytes for writer in writers):
            raise ValueError(f"{sources[0].what}: too little text to cut in two")
        validation.seek(0)
        shutil.copyfileobj(validation, train)
        header = {
            "state": state,
            "vocab_size": tokenizer.vocab_size,
            "dtype": writers[0].dtype.str,
            "train": writers[0].summary(),
            "validation": writers[1].summary(),
            "pages": _checksum(train, train.tell() - HEADER),
        }
        _write_header(train, header)


def _write_documents(
    sources: Sequence[Source], plan: Plan, writers: tuple[_SideWriter, _SideWriter]
) -> None:
    for source, sides in zip(sources, plan.sides, strict=True):
        for (_, chunks), side in zip(source.documents(), sides, strict=False):
            if side == LEFT_OUT:
                continue
            if plan.cut_at is None:
                writers[side].add(chunks)
            else:
                for writer, text in zip(writers, cut(chunks, plan.cut_at), strict=True):
                    writer.add(text)


def _remove_abandoned(path: Path, age_s: float) -> None:
    """Removes what killed processes have left of this file, once it is untouched for so long."""
    for part in parts_of(path):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.lstat().st_mtime > age_s:
                part.unlink()
