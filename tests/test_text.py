"""Text as blocks: nothing lost, no leak between the two sides, mistakes in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.data import build_data
from hybrid.data.loader import load_micro_batch
from hybrid.data.text import documents
from hybrid.data.text.documents import pieces
from hybrid.data.text.sources import CHUNK, standard_library, sysconfig
from hybrid.job.errors import JobError
from hybrid.models.losses import IGNORED_TARGET
from tests.conftest import small_job
from tests.texts import WORDS, documents_of, many, read, write_files


@pytest.mark.parametrize("context", [1, 7, 16, 255])
def test_every_byte_is_a_target_once(context: int, tmp_path: Path) -> None:
    path = many(tmp_path / "texts")
    sides = read(tmp_path, path=path, context=context)
    found = [d for side in sides for d in documents_of(side)]
    assert sorted(found) == sorted(p.read_bytes() for p in Path(path).iterdir())
    for side in sides:
        assert len(side) == -(-side.num_tokens // context)
        assert all(x.shape == y.shape == (context,) for x, y in side)
        assert all(x.dtype == y.dtype == torch.int64 for x, y in side)
        texts = documents_of(side)
        assert (side.num_bytes, side.num_documents) == (sum(map(len, texts)), len(texts))
    assert side[-1][0].equal(side[len(side) - 1][0])
    with pytest.raises(IndexError):
        side[len(side)]


def test_documents_keep_the_order_of_their_names(tmp_path: Path) -> None:
    texts = {"b/1.txt": "second\n" * 9, "a.txt": "first\n" * 9, ".hidden": "no", "b/.no/x": "no"}
    train, validation = read(
        tmp_path, path=write_files(tmp_path / "texts", texts | {"c": "last\n"})
    )
    assert documents_of(train) == [b"first\n" * 9, b"second\n" * 9]
    assert documents_of(validation) == [b"last\n"]


def test_a_pattern_and_a_file_and_a_folder(tmp_path: Path) -> None:
    many(tmp_path / "texts" / "deep", 4)
    (tmp_path / "texts" / "other.md").write_text("not this")
    by_folder = read(tmp_path, path=str(tmp_path / "texts" / "deep"))
    by_pattern = read(tmp_path, path=str(tmp_path / "texts" / "**" / "*.txt"))
    assert [s.fingerprint for s in by_pattern] == [s.fingerprint for s in by_folder]
    train, _ = read(tmp_path, path=str(tmp_path / "texts" / "deep" / "001.txt"))
    assert train.num_documents == 1


def test_the_default_corpus(tmp_path: Path) -> None:
    train, validation = read(tmp_path, max_bytes=2_000_000, context=256)
    assert 1_700_000 < train.num_bytes + validation.num_bytes <= 2_000_000
    assert 0.07 < validation.num_bytes / 2_000_000 <= 0.1
    assert any(d.startswith(b'"""Record of phased-in') for d in documents_of(train))
    files = [Path(f) for f in standard_library().files]
    assert len(files) > 300 and {f.suffix for f in files} == {".py"}
    assert not {"site-packages", "test", "tests", "__pycache__"} & {
        x for f in files for x in f.parts
    }
    assert not [f for f in files if f.name.startswith("_sysconfigdata")]


def test_text_in_another_encoding_is_left_out_of_the_default_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(
        tmp_path / "lib", {"a.py": WORDS, "b.py": WORDS * 2, "test/c.py": "no", "d.so": "no"}
    )
    (tmp_path / "lib" / "latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    found = [d for side in read(tmp_path) for d in documents_of(side)]
    assert found == [(WORDS * 2).encode(), WORDS.encode()]


def test_the_split_is_of_whole_documents_by_their_text(tmp_path: Path) -> None:
    path = many(tmp_path / "texts", 200)
    train, validation = read(tmp_path, path=path)
    whole = train.num_bytes + validation.num_bytes
    assert 0.09 < validation.num_bytes / whole <= 0.1
    held = set(documents_of(validation))
    assert not held & set(documents_of(train))
    # other names, another order, more documents: what was tested on mostly still is
    renamed = {f"{900 - i}": p.read_text() for i, p in enumerate(sorted(Path(path).iterdir()))}
    _, again = read(tmp_path, path=write_files(tmp_path / "renamed", renamed))
    assert set(documents_of(again)) == held
    _, more = read(tmp_path, path=write_files(tmp_path / "renamed", {"new": "a new text"}))
    assert len(set(documents_of(more)) & held) >= len(held) - 2


def test_copies_of_a_document_are_on_one_side(tmp_path: Path) -> None:
    texts = {f"{i}.{copy}": f"text {i} {WORDS}" for i in range(30) for copy in range(i % 3 + 1)}
    train, validation = read(tmp_path, path=write_files(tmp_path / "texts", texts), validation=0.4)
    ours, theirs = documents_of(train), documents_of(validation)
    assert len(ours) + len(theirs) == len(texts) and len(set(theirs)) < len(theirs)
    assert not set(ours) & set(theirs)


def test_of_two_documents_the_smaller_is_validation(tmp_path: Path) -> None:
    path = write_files(tmp_path / "texts", {"a": "short", "b": WORDS * 20, "empty": ""})
    train, validation = read(tmp_path, path=path, validation=0.001)
    assert documents_of(validation) == [b"short"] and documents_of(train) == [(WORDS * 20).encode()]


@pytest.mark.parametrize("variant", range(8))
def test_a_very_long_document_is_no_obstacle(variant: int, tmp_path: Path) -> None:
    texts = {f"{i}": f"{i} {WORDS}" for i in range(100)} | {"long": f"{variant} {WORDS}" * 100}
    train, validation = read(tmp_path, path=write_files(tmp_path / "texts", texts))
    assert 0.09 < validation.num_bytes / (train.num_bytes + validation.num_bytes) <= 0.1


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("validation", [0.001, 0.1, 0.5])
def test_a_single_document_is_cut_in_two(copies: int, validation: float, tmp_path: Path) -> None:
    whole = "été 東京 " * 50
    path = write_files(tmp_path / "texts", {str(i): whole for i in range(copies)})
    (head,), (tail,) = map(documents_of, read(tmp_path, path=path, validation=validation))
    assert head.decode() + tail.decode() == whole  # decodes: no character was cut
    assert 0 <= len(tail) - validation * len(whole.encode()) < 4


def test_a_long_document_is_cut_within_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE", 50)
    path = write_files(tmp_path, {"long.txt": WORDS * 30})
    for validation in (0.1, 0.35, 0.9):
        (head,), (tail,) = map(
            documents_of, read(tmp_path, path=f"{path}/long.txt", validation=validation)
        )
        assert (head + tail).decode() == WORDS * 30
        assert abs(len(tail) - validation * len(head + tail)) < 4


@pytest.mark.parametrize("size", [4, 5, 40, 1000])
def test_pieces_are_whole_lines_or_whole_characters(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE", size)
    whole = (WORDS * 20 + "東京" * 60 + "\n" + WORDS).encode()
    for chunk in (1, 3, 64, len(whole)):
        chunks = [whole[i : i + chunk] for i in range(0, len(whole), chunk)]
        found = list(pieces(chunks))
        assert b"".join(found) == whole and max(map(len, found)) <= size
        assert all(piece.decode() for piece in found)
        assert all(p.endswith(b"\n") or b"\n" not in p for p in found)


def test_the_first_documents_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    path = write_files(tmp_path / "texts", {f"{i}": f"{i}{'x' * 99}" for i in range(9)})
    train, validation = read(tmp_path, path=path, max_bytes=550)
    assert sorted(d[:1] for s in (train, validation) for d in documents_of(s)) == [
        b"0", b"1", b"2", b"3", b"4"
    ]  # fmt: skip


def test_a_batch_of_blocks(tmp_path: Path) -> None:
    train, _ = read(tmp_path, path=many(tmp_path / "texts"))
    batch = load_micro_batch(train, [3, 0, len(train) - 1], size=5)
    assert batch.input.shape == batch.target.shape == (5, 16)
    assert batch.input[0].equal(train[3][0]) and batch.target[1].equal(train[0][1])
    assert train.vocab_size == 257 and IGNORED_TARGET == IGNORED_TARGET


# Mistakes: each is one line that names the option.

# name: (options, words of the message); FOLDER stands for the folder with the files below.
MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no such file": ({"path": "FOLDER/nowhere.txt"}, ["path = '", "nowhere.txt'", "no file"]),
    "no match": ({"path": "FOLDER/*.md"}, ["path = '", "*.md'", "no file"]),
    "an empty folder": ({"path": "FOLDER/none"}, ["path = '", "none'", "no file"]),
    "an empty file": ({"path": "FOLDER/empty.txt"}, ["path = '", "empty.txt'", "no text"]),
    "not UTF-8": ({"path": "FOLDER/latin.txt"}, ["latin.txt is not UTF-8", "byte 262143"]),
    "one character": ({"path": "FOLDER/one.txt"}, ["one.txt'", "too little"]),
    "a device": ({"path": "/dev/null"}, ["path = '/dev/null'", "no file"]),
    "a short text": ({"path": "FOLDER/good.txt", "context": 900}, ["context = 900", "tokens"]),
    "no context": ({"context": 0}, ["context = 0", "1 or more"]),
    "half a context": ({"context": 1.5}, ["context = 1.5", "whole number"]),
    "a context of a word": ({"context": "8"}, ["context = '8'", "whole number"]),
    "a true context": ({"context": True}, ["context = True", "whole number"]),
    "no validation": ({"validation": 0.0}, ["validation = 0.0", "between 0 and 1"]),
    "all validation": ({"validation": 1}, ["validation = 1", "between 0 and 1"]),
    "few bytes": ({"path": "FOLDER/good.txt", "max_bytes": 9}, ["max_bytes = 9", "alone has"]),
    "two sources": ({"path": "a", "dataset": "b"}, ["path = 'a'", "dataset"]),
    "a split of files": ({"path": "a", "split": "train"}, ["split = 'train'", "without dataset"]),
    "a share of splits": (
        {"dataset": "a", "validation": 0.2, "validation_split": "b"},
        ["validation has no effect", "validation_split"],
    ),
    "an empty path": ({"path": ""}, ["path = ''"]),
    "a number for a path": ({"path": 3}, ["path = 3"]),
    "no tokenizer": (
        {"path": "FOLDER/good.txt", "tokenizer": "./no.json"},
        ["tokenizer = './no.json'", "no such file"],
    ),
    "no tokenizer's file": (
        {"path": "FOLDER/good.txt", "tokenizer": "FOLDER/good.txt"},
        ["tokenizer = '", "good.txt'", "cannot be loaded", "valid: bytes"],
    ),
    "no tokenizer's folder": (
        {"path": "FOLDER/good.txt", "tokenizer": "FOLDER/none"},
        ["tokenizer = '", "none'", "cannot be loaded", "valid: bytes"],
    ),
    "no cache": (
        {"path": "FOLDER/good.txt", "cache": "FOLDER/good.txt/cache"},
        ["Not a directory", "good.txt/cache"],
    ),
    "no data set": ({"dataset": "FOLDER/none"}, ["dataset = '", "cannot be loaded"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    write_files(tmp_path, {"empty.txt": "", "one.txt": "é", "good.txt": WORDS * 3})
    # cut after its first chunk, the wrong byte looks like the beginning of a character
    (tmp_path / "latin.txt").write_bytes(b"a" * (CHUNK - 1) + b"\xe9 au lait")
    options, words = MISTAKES[case]
    spelt = {k: v.replace("FOLDER", str(tmp_path)) if isinstance(v, str) else v
             for k, v in options.items()}  # fmt: skip
    with pytest.raises(ValueError) as found:
        read(tmp_path, **spelt)
    message = str(found.value)
    assert "\n" not in message and not [w for w in words if w not in message], message


def test_a_job_names_text(tmp_path: Path) -> None:
    options = {"path": many(tmp_path / "texts"), "context": 8, "cache": str(tmp_path / "cache")}
    train, validation = build_data(small_job(data__name="text", data__options=options))
    assert len(train) > len(validation) > 0
    with pytest.raises(JobError, match=r"data\.options .* 'text': .*; valid: path, dataset"):
        build_data(small_job(data__name="text", data__options={"folder": "x"}))
    with pytest.raises(JobError, match=r"data\.options .* 'text': context = 0"):
        build_data(small_job(data__name="text", data__options={"context": 0}))
