"""This module decides on which side of the split each document goes and cuts its bytes into pieces.

It reads the documents once to hash them, and keeps 16 bytes for each, never their text."""

import codecs
import dataclasses
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy

from .sources import Source

PIECE = 1 << 18  # bytes that are tokenised at once
TRAIN, VALIDATION, LEFT_OUT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """Says for each source on which side its documents are, in order (`sides`).

    A single document is cut at the byte `cut_at`: train text before it, validation text after it.
    """

    sides: tuple[numpy.ndarray, ...]
    cut_at: int | None = None


def plan_documents(sources: Sequence[Source], validation: float, max_bytes: int | None) -> Plan:
    """Plans the split of one source, or takes a train and a validation source as they are.

    One source is split by a hash of the documents' text, which does not depend on their names or
    places; copies of a text stay together. Walk the documents in hash order and move each to
    validation if it still fits in `validation` x total bytes. The walk ends at the first that does
    not fit, but skips a text that is larger than this share by itself; if all are larger, the
    smallest goes to validation.

    With two sources, a train document whose text is also a validation document is left out. Raises
    ValueError where a text is not UTF-8 or where there is no text."""
    scans = [_scan(source, max_bytes) for source in sources]
    if len(scans) == 2:
        sides = [numpy.where(sizes > 0, side, LEFT_OUT) for side, (_, sizes) in enumerate(scans)]
        sides[TRAIN][numpy.isin(scans[TRAIN][0], scans[VALIDATION][0])] = LEFT_OUT
        for source, chosen in zip(sources, sides, strict=True):
            if (chosen == LEFT_OUT).all():
                raise ValueError(f"{source.what}: no text that validation does not have too")
        return Plan(tuple(sides))
    ((hashes, sizes),) = scans
    full = numpy.flatnonzero(sizes > 0)
    if (hashes[full] == hashes[full[0]]).all():  # one text, of whose copies only the first is used
        only = numpy.full(len(sizes), LEFT_OUT)
        only[full[0]] = TRAIN
        size = int(sizes[full[0]])
        return Plan((only,), size - max(1, round(size * validation)))
    return Plan((_split(hashes, sizes, validation),))


def _split(hashes: numpy.ndarray, sizes: numpy.ndarray, validation: float) -> numpy.ndarray:
    """Returns the sides of documents of two or more texts, by the rule of `plan_documents`."""
    full = sizes > 0
    _, text_of = numpy.unique(hashes[full], return_inverse=True)
    weights = numpy.bincount(text_of, sizes[full])  # bytes of all copies, in the order of hashes
    room = validation * weights.sum()
    small = weights <= room
    taken = small & (numpy.where(small, weights, 0).cumsum() <= room)
    if not taken.any():
        taken[weights.argmin()] = True
    sides = numpy.full(len(sizes), LEFT_OUT)
    sides[full] = numpy.where(taken[text_of], VALIDATION, TRAIN)
    return sides


def _scan(source: Source, max_bytes: int | None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Returns the hash and the number of bytes of each document; 0 bytes mean that it is left out.

    The scan ends before the document with which all of them would have more than `max_bytes`."""
    hashes, sizes, total = array("Q"), array("q"), 0
    for name, chunks in source.documents():
        digest, size = _scan_document(source, name, chunks)
        if max_bytes is not None and total + size > max_bytes:
            if total == 0:
                raise ValueError(f"max_bytes = {max_bytes}: {name} alone has {size} bytes")
            break
        total += size
        hashes.append(digest)
        sizes.append(size)
    if total == 0:
        raise ValueError(f"{source.what}: no text in {len(sizes)} documents")
    return numpy.array(hashes, numpy.uint64), numpy.array(sizes, numpy.int64)


def _scan_document(source: Source, name: str, chunks: Iterable[bytes]) -> tuple[int, int]:
    digest, size = hashlib.blake2b(digest_size=8), 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for chunk in chunks:
            decoder.decode(chunk)
            digest.update(chunk)
            size += len(chunk)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        if source.lenient:
            return 0, 0
        at = size - len(decoder.getstate()[0]) + error.start
        raise ValueError(f"{source.what}: {name} is not UTF-8 text (byte {at})") from None
    return int.from_bytes(digest.digest()), size


def pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the same bytes in pieces of at most `PIECE` bytes.

    Each is cut after the last end of a line in it or, if it has none, between two characters."""
    waiting = bytearray()
    for chunk in chunks:
        waiting += chunk
        while len(waiting) > PIECE:
            end = waiting.rfind(b"\n", 0, PIECE) + 1 or _before_character(waiting, PIECE)
            yield bytes(waiting[:end])
            del waiting[:end]
    if waiting:
        yield bytes(waiting)


def cut(chunks: Iterable[bytes], at: int) -> tuple[Iterator[bytes], Iterator[bytes]]:
    """Returns the bytes before the character that byte `at` is part of, and the others.

    The first iterator must be used up before the second."""
    stream = pieces(chunks)
    rest: list[bytes] = []

    def head() -> Iterator[bytes]:
        left = at
        for piece in stream:
            if len(piece) > left:
                end = _before_character(piece, left)
                rest.append(piece[end:])
                yield piece[:end]
                return
            yield piece
            left -= len(piece)

    return head(), itertools.chain(rest, stream)


def _before_character(text: bytes | bytearray, at: int) -> int:
    """Returns the first byte of the UTF-8 character that byte `at` is part of."""
    while at > 0 and text[at] & 0b1100_0000 == 0b1000_0000:
        at -= 1
    return at
