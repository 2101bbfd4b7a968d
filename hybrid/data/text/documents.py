"""Which side of the split each document goes to, and how its bytes are cut into pieces.

Documents are read once to hash them: 16 bytes a document are kept, never their text.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy

from .sources import Source

PIECE = 1 << 18  # bytes that are tokenised at once
TRAIN, VALIDATION, LEFT_OUT = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """`sides`: of each source, its documents' sides in order. `cut_at`: the byte at which the only
    document is cut in two, train text before and validation text behind; None where there are more.
    """

    sides: tuple[numpy.ndarray, ...]
    cut_at: int | None = None


def plan_documents(sources: Sequence[Source], validation: float, max_bytes: int | None) -> Plan:
    """Read all documents of one source, to be split, or of a train and a validation source.

    Where one source is split, documents are put in the order of a hash of their text, which neither
    their names nor their places matter to, copies of one text together. From its front they go to
    validation while the sum of their bytes is at most the share `validation` of the whole; a text
    larger than that never does; the smallest does where all are larger. Of two sources, a train
    document whose text is also a validation document is left out. ValueError where a text is not
    UTF-8 or there is none.
    """
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
    if (hashes[full] == hashes[full[0]]).all():  # one text; of its copies only one is used
        only = numpy.full(len(sizes), LEFT_OUT)
        only[full[0]] = TRAIN
        size = int(sizes[full[0]])
        return Plan((only,), size - max(1, round(size * validation)))
    return Plan((_split(hashes, sizes, validation),))


def _split(hashes: numpy.ndarray, sizes: numpy.ndarray, validation: float) -> numpy.ndarray:
    """Sides of documents of two or more texts, see `plan_documents`."""
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
    """Hash and number of bytes of each document, from the first on as long as all of them together
    have at most `max_bytes`. Size 0: left out."""
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
    """The same bytes in pieces of at most `PIECE`, each cut behind the last line's end that lies
    in it, or where there is none, between two characters."""
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
    """The bytes before the character that byte `at` is part of, and the others; the first of the
    two must be used up before the second."""
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

    def tail() -> Iterator[bytes]:
        yield from rest
        yield from stream

    return head(), tail()


def _before_character(text: bytes | bytearray, at: int) -> int:
    """The first byte of the character of UTF-8 that byte `at` is part of."""
    while at > 0 and text[at] & 0b1100_0000 == 0b1000_0000:
        at -= 1
    return at
