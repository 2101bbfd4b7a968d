"""Takes the hash of a state while its ranks write it, instead of reading it all again afterwards.

Rank 0 takes it. The other ranks of its host pass what they hold to it through memory that they
share; what ranks of other hosts hold it reads from their files, once these are written."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .channel import Receiver, Sender, remove
from .file_hash import hash_entries, ranges_of
from .manifest import Entry, rank_file
from .pieces import Share
from .tensor_file import WIDTHS, TensorFile
from .tensors import raw_bytes

READ_BYTES = 2**20  # of a file at once


class _GivenUp(Exception):
    """Ends the part of a rank in a save that has failed, which says why by itself."""


class PassingHash(threading.Thread):
    """Takes the hash on rank 0, and passes on to it what another rank holds.

    shares: what this rank writes, in canonical order. The calls come in the order in which they
    stand here, on every rank; all of them have made one before any makes the next."""

    def __init__(self, rank: int, shares: Sequence[Share]) -> None:
        super().__init__(daemon=True)
        self._rank, self._shares = rank, shares
        self._receivers: dict[int, Receiver] = {}  # by the rank that passes on what it holds
        self._sender: Sender | None = None
        self._entries: Mapping[tuple[str, str], Entry] = {}
        self._written, self._given_up = threading.Event(), False
        self._error: BaseException | None = None
        self._hash = ""

    def open_channels(self, folder: Path, sizes: Mapping[int, int]) -> None:
        """Make channels, for rank 0 alone; sizes: what a rank passes on, in bytes.

        Some are left out where the file system has no pipes, or no more files may be open."""
        with contextlib.suppress(OSError):
            for rank, size in sizes.items():
                path = folder / rank_file(rank)
                self._receivers[rank] = Receiver(path, size, self._require_wanted)

    def join_channel(self, folder: Path) -> bool:
        """Open the channel that rank 0 has made for this rank, and tell whether there is one.

        There is none where rank 0 runs on another host, whatever its name."""
        if self._rank:
            with contextlib.suppress(OSError):
                path = folder / rank_file(self._rank)
                self._sender = Sender(path, size_of(self._shares), self._require_wanted)
        return self._sender is not None

    def begin(
        self, folder: Path, entries: Mapping[tuple[str, str], Entry], joined: Sequence[bool]
    ) -> None:
        """Begin with the thread's part.

        entries: all of the state as the files of `folder` will hold it; rank 0 needs them. joined:
        what `join_channel` returned on each rank."""
        self._folder, self._entries = folder, entries
        for rank in list(self._receivers):
            remove(folder / rank_file(rank))  # nobody needs the name any more
            if not joined[rank]:
                self._receivers.pop(rank).close()
        if self._rank == 0 or self._sender:
            self.start()

    def finish(self) -> str:
        """Wait for the thread's part once all ranks have written; return the hash on rank 0.

        Raises what has gone wrong."""
        self._written.set()
        self._join()
        if self._error is not None:
            raise self._error
        return self._hash

    def give_up(self) -> None:
        """End the thread's part where it is, at any time."""
        self._given_up = True
        self._written.set()
        self._join()
        self._close()

    def _join(self) -> None:
        if self.ident is not None:
            self.join()

    def _close(self) -> None:
        while self._receivers:
            self._receivers.popitem()[1].close()
        if self._sender:
            self._sender.close()
            self._sender = None

    def run(self) -> None:
        """Do the part, and keep what goes wrong for `finish`."""
        try:
            if self._sender:
                self._send(self._sender)
            else:
                self._take()
        except BaseException as error:
            self._error = error
        finally:
            self._close()

    def _send(self, sender: Sender) -> None:
        for share in self._shares:
            for block in share.blocks():
                sender.send(memoryview(raw_bytes(block)))

    def _take(self) -> None:
        own = {(*share.piece.entry, share.start): share for share in self._shares}
        receivers = {rank_file(rank): one for rank, one in self._receivers.items()}
        files: dict[str, TensorFile] = {}  # of ranks of other hosts
        room = memoryview(bytearray(READ_BYTES))

        def blocks(name: str, key: str, entry: Entry) -> Iterator[memoryview]:
            for start, count, file, stored, _ in ranges_of(entry):
                self._require_wanted()
                if file == rank_file(0):
                    yield from map(raw_bytes, own[name, key, start].blocks())
                elif file in receivers:
                    yield from _received(receivers[file], count * WIDTHS[entry.dtype])
                else:
                    yield from self._opened(files, file).blocks(stored, 0, count, room)

        try:
            self._hash = hash_entries(self._entries, blocks)
        finally:
            for opened in files.values():
                opened.close()

    def _opened(self, files: dict[str, TensorFile], name: str) -> TensorFile:
        """Return the file of a rank of another host, once that has written it."""
        self._written.wait()
        self._require_wanted()
        if name not in files:
            files[name] = TensorFile(self._folder / name)
        return files[name]

    def _require_wanted(self) -> None:
        if self._given_up:
            raise _GivenUp


def _received(receiver: Receiver, rest: int) -> Iterator[memoryview]:
    """Yield so many bytes as they come; each block is gone when the next one comes."""
    while rest:
        block = receiver.receive()
        yield block
        receiver.release(len(block))
        rest -= len(block)


def size_of(shares: Sequence[Share]) -> int:
    """Return the bytes of shares."""
    return sum(share.count * share.piece.tensor.dtype.itemsize for share in shares)
