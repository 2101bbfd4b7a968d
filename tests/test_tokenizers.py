"""Text by a Hugging Face tokenizer, and from the `datasets` library; nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid.data import text
from hybrid.data.text.cache import dtype_for
from hybrid.data.text.tokenizers import Bytes, load_tokenizer
from tests.texts import WORDS, documents_of, many, read, tokens_of


def make_tokenizer(folder: Path, texts: list[str], eos: str | None = "<eos>") -> Path:
    """A byte-level BPE tokenizer of 280 tokens, saved as a folder."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[eos] if eos else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if eos:  # put before every text that is not said to be a part
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{eos} $A", special_tokens=[(eos, made.token_to_id(eos))]
        )
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder."""
    return make_tokenizer(tmp_path_factory.mktemp("bpe"), [WORDS])


def test_a_hugging_face_tokenizer(tmp_path: Path, bpe: Path) -> None:
    path = many(tmp_path / "texts", 12)
    by_bytes = read(tmp_path, path=path)
    from_folder = read(tmp_path, path=path, tokenizer=str(bpe))
    from_file = read(tmp_path, path=path, tokenizer=str(bpe / "tokenizer.json"))
    tokenizer = load_tokenizer(str(bpe))
    for side, other, plain in zip(from_folder, from_file, by_bytes, strict=True):
        assert side.fingerprint == other.fingerprint and side.vocab_size == 280
        assert side.num_tokens < plain.num_tokens / 2 and side.num_bytes == plain.num_bytes
        tokens = tokens_of(side)
        assert tokens[0] == tokens[-1] == tokenizer.end
        assert tokens.count(tokenizer.end) == side.num_documents + 1
        assert tokenizer.decode(tokens).encode() == b"".join(documents_of(plain))


def test_a_changed_tokenizer_is_noticed(tmp_path: Path) -> None:
    path = many(tmp_path / "texts", 5)
    folder = make_tokenizer(tmp_path / "bpe", [WORDS], eos="<stop>")
    (folder / "model.safetensors").touch()
    before = read(tmp_path, path=path, tokenizer=str(folder))
    make_tokenizer(folder, ["quite other words than those"])
    after = read(tmp_path, path=path, tokenizer=str(folder))
    assert before[0].fingerprint != after[0].fingerprint


def test_large_vocabularies_take_four_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(Bytes):
        vocab_size = 2**16 + 1
        end = 2**16

    assert dtype_for(2**16).itemsize == 2
    monkeypatch.setattr(text, "load_tokenizer", lambda _: Large())
    train, _ = read(tmp_path, path=many(tmp_path / "texts", 5))
    assert tokens_of(train)[0] == 2**16 and train.vocab_size == 2**16 + 1
    Large.vocab_size = 256
    with pytest.raises(ValueError, match="made token 65536 of a vocabulary of 256"):
        read(tmp_path, path=many(tmp_path / "texts", 6))


def test_a_tokenizer_that_names_no_end(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "bpe", [WORDS], eos=None)
    with pytest.raises(ValueError, match="names no end of a text"):
        read(tmp_path, path=many(tmp_path / "texts"), tokenizer=str(folder))


# Data sets of the `datasets` library.


def rows(number: int) -> dict[str, list[Any]]:
    """Columns of a data set."""
    return {"text": [f"row {i} {WORDS}" for i in range(number)], "other": list(range(number))}


def test_a_data_set_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows(100)).save_to_disk(tmp_path / "saved")
    sides = read(tmp_path, dataset=str(tmp_path / "saved"))
    assert sorted(d for s in sides for d in documents_of(s)) == sorted(
        t.encode() for t in rows(100)["text"]
    )
    monkeypatch.setitem(sys.modules, "datasets", None)  # a second call does not need it
    again = read(tmp_path, dataset=str(tmp_path / "saved"), context=5)
    assert again[0].fingerprint == sides[0].fingerprint


def test_the_splits_of_a_data_set(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    made = {"train": rows(30), "dev": {"text": ["row 3 " + WORDS, "only here"], "other": [0, 0]}}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict(v) for k, v in made.items()})
    saved.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    train, validation = read(tmp_path, dataset=path, validation_split="dev")
    assert documents_of(validation) == [("row 3 " + WORDS).encode(), b"only here"]
    assert documents_of(train) == [t.encode() for t in rows(30)["text"] if t[:6] != "row 3 "]
    with pytest.raises(ValueError, match=r"split = 'test'.*valid: train, dev"):
        read(tmp_path, dataset=path, split="test")
    with pytest.raises(ValueError, match=r"field = 'txt'.*valid: text, other"):
        read(tmp_path, dataset=path, field="txt")
    with pytest.raises(ValueError, match=r"field = 'other': row 0 holds int, not text"):
        read(tmp_path, dataset=path, field="other")


def test_a_file_that_datasets_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.Dataset.from_dict(rows(9)).to_json(tmp_path / "rows.jsonl")
    sides = read(tmp_path, dataset=str(tmp_path / "rows.jsonl"))
    assert sum(s.num_documents for s in sides) == 9


def test_without_the_datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="dataset = 'a/b': needs the datasets package"):
        read(tmp_path, dataset="a/b")


def test_pieces_of_many_documents_are_tokenised_together(bpe: Path) -> None:
    """A batch has the tokens that each piece has alone; an empty text has none."""
    tokenizer, texts = load_tokenizer(str(bpe)), [b"one two", b"", "d\u00e9j\u00e0\n".encode() * 7]
    both = tokenizer.encode_all(texts)
    assert [found.tolist() for found in both] == [tokenizer.encode(t).tolist() for t in texts]
    assert [tokenizer.decode(found.tolist()).encode() for found in both] == texts
