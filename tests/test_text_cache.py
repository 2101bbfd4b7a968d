"""Token files: written once, whole or not at all, and written anew when anything changed."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from hybrid.data import text as text_module
from hybrid.data.text import cache, sources, text
from hybrid.data.text.cache import HEADER
from hybrid.data.text.tokenizers import Bytes
from hybrid.records.whole import part_of
from tests.conftest import ROOT
from tests.texts import WORDS, documents_of, many, read, tokens_of


def untouchable(*_: Any) -> Any:
    """Stands for what a cached call must not do."""
    raise AssertionError("text was read again")


def test_a_second_call_reads_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path / "texts")
    first = read(tmp_path, path=path)
    monkeypatch.setattr(sources, "_chunks", untouchable)
    monkeypatch.setattr(text_module, "load_tokenizer", untouchable)
    monkeypatch.chdir(tmp_path)
    for again in (
        read(tmp_path, path=path),
        read(tmp_path, path="texts"),
        read(tmp_path, path=path, context=9),
    ):
        assert [s.fingerprint for s in again] == [s.fingerprint for s in first]
    with pytest.raises(AssertionError, match="read again"):
        read(tmp_path, path=path, validation=0.2)


def test_changed_text_is_noticed(tmp_path: Path) -> None:
    path = many(tmp_path / "texts", 5)
    file = Path(path, "003.txt")
    old, before = read(tmp_path, path=path), file.stat()
    file.write_text(file.read_text().replace("alpha", "ALPHA"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if it had not been
    assert file.stat().st_size == before.st_size
    new = read(tmp_path, path=path)
    assert b"ALPHA" in b"".join(d for s in new for d in documents_of(s))
    assert [s.fingerprint for s in new] != [s.fingerprint for s in old]
    Path(path, "zzz.txt").write_text("one more")
    assert sum(s.num_documents for s in read(tmp_path, path=path)) == 6
    assert len(list((tmp_path / "cache").glob("*.tokens"))) == 1  # the old one is replaced
    assert tokens_of(old[0])  # and stays whole for those who have it open


def damage_byte(at: int) -> Callable[[bytearray], None]:
    """Flips a byte."""

    def apply(data: bytearray) -> None:
        data[at] ^= 1

    return apply


DAMAGE: dict[str, Callable[[bytearray], None]] = {
    "empty": lambda data: data.clear(),
    "cut short": lambda data: data.__delitem__(slice(-2, None)),
    "longer": lambda data: data.extend(b"\0\0"),
    "cut in the header": lambda data: data.__delitem__(slice(100, None)),
    "header": damage_byte(200),
    "header's checksum": damage_byte(3),
    "first token": damage_byte(HEADER),
    "a token": damage_byte(HEADER + 999),
    "last token": damage_byte(-1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_written_anew(case: str, tmp_path: Path) -> None:
    path = many(tmp_path / "texts")
    first = read(tmp_path, path=path)
    (file,) = (tmp_path / "cache").glob("*.tokens")
    whole = file.read_bytes()
    data = bytearray(whole)
    DAMAGE[case](data)
    file.unlink()  # `first` has it open
    file.write_bytes(data)
    reason = "size" if case in ("cut short", "longer") else ""
    with pytest.warns(UserWarning, match=f"damaged.*{reason}"):
        again = read(tmp_path, path=path)
    assert file.read_bytes() == whole
    assert [tokens_of(s) for s in again] == [tokens_of(s) for s in first]


def test_tokens_that_are_in_no_vocabulary_are_refused_with_sums_that_fit(tmp_path: Path) -> None:
    """Somebody else may have put them into a shared folder; a row of the embedding would lack."""
    path = many(tmp_path / "texts")
    first = read(tmp_path, path=path)
    (file,) = (tmp_path / "cache").glob("*.tokens")
    data = bytearray(file.read_bytes())
    data[-2:] = b"\xff\xff"
    file.unlink()
    file.write_bytes(data)
    with file.open("r+b") as planted:
        header = cache._read_header(planted) | {"dtype": "O"}  # what it says is not asked
        cache._write_header(
            planted, header | {"pages": cache._checksum(planted, len(data) - HEADER)}
        )
    with pytest.warns(UserWarning, match="damaged .it has tokens that are not in the vocabulary"):
        again = read(tmp_path, path=path)
    assert [tokens_of(s) for s in again] == [tokens_of(s) for s in first]


def test_of_a_large_file_pages_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PAGE", 64)
    monkeypatch.setattr(cache, "CHECKED_PAGES", 3)
    path = many(tmp_path / "texts")
    read(tmp_path, path=path)
    (file,) = (tmp_path / "cache").glob("*.tokens")
    pages = (file.stat().st_size - HEADER - 1) // 64
    for page in (0, pages // 2, pages):
        data = bytearray(file.read_bytes())
        data[HEADER + page * 64] ^= 1
        file.write_bytes(data)
        with pytest.warns(UserWarning, match="damaged"):
            read(tmp_path, path=path)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Bytes, piece: bytes) -> numpy.ndarray:
        if piece.startswith(b"30 "):
            raise OSError(28, "No space left on device")
        return numpy.frombuffer(piece, numpy.uint8)

    path = many(tmp_path / "texts")
    with monkeypatch.context() as patch:
        patch.setattr(Bytes, "encode", encode)
        with pytest.raises(ValueError, match="No space left"):
            read(tmp_path, path=path)
    cache = tmp_path / "cache"
    assert [f.suffix for f in cache.iterdir()] == [".lock"]
    (lock,) = cache.iterdir()
    old, other = part_of(lock.with_suffix(".tokens")), cache / f".{lock.stem}.tokens.12.part"
    old.touch()  # of a process that was killed
    other.touch()
    read(tmp_path, path=path)
    assert not old.exists() and other.exists()


def test_long_work_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = many(tmp_path / "texts")
    read(tmp_path, path=path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cache, "NOTE_S", 0.0)
    read(tmp_path, path=path, validation=0.2)
    assert "hybrid: tokenised 0 MB of text\n" in capsys.readouterr().err


def test_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = many(tmp_path / "texts")

    def load_slowly(name: str) -> Bytes:
        Path(path, "000.txt").write_text("something else")
        return Bytes()

    monkeypatch.setattr(text_module, "load_tokenizer", load_slowly)
    with pytest.raises(ValueError, match="changed while it was read"):
        read(tmp_path, path=path)
    assert not list((tmp_path / "cache").glob("*.tokens"))


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path / "texts")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given, expected in (
        (str(tmp_path / "xdg"), tmp_path / "xdg"),
        ("relative", tmp_path / "home" / ".cache"),
        ("", tmp_path / "home" / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        text(path=path)
        assert list((expected / "hybrid" / "text").glob("*.tokens"))
        for file in (expected / "hybrid" / "text").iterdir():
            file.unlink()


BUILD = """
import sys, time
from hybrid.data import text
from hybrid.data.text import tokenizers
def slow(self, piece, encode=tokenizers.Bytes.encode):
    print("encoded", file=sys.stderr)
    time.sleep(0.02)
    return encode(self, piece)
tokenizers.Bytes.encode = slow
print(*[side.fingerprint for side in text.text(path=sys.argv[1], cache=sys.argv[2])])
"""


@pytest.mark.slow
def test_processes_that_start_together(tmp_path: Path) -> None:
    path = many(tmp_path / "texts")
    command = [sys.executable, "-c", BUILD, path, str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) for _ in range(3)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in said}) == 1 and said[0][0].split()
    # the lock let one of them do the work
    assert sorted(err.count("encoded") for _, err in said) == [0, 0, 40]
    assert sorted(f.suffix for f in (tmp_path / "cache").iterdir()) == [".lock", ".tokens"]


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    file = tmp_path / "large.txt"
    with file.open("w") as stream:
        for i in range(64):
            stream.write(f"{i:07} {WORDS}" * (2**20 // len(f"{i:07} {WORDS}".encode())))
    assert file.stat().st_size > 63 * 2**20
    tracemalloc.start()
    train, validation = read(tmp_path, path=str(file))
    _ = train[len(train) // 2], validation[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert train.num_bytes + validation.num_bytes == file.stat().st_size
    assert peak < 6 * 2**20
