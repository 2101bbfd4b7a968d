"""This package turns text into fixed blocks of next tokens.

The text comes from files, from a `datasets` data set or, with nothing to download, from the source
text of Python's standard library. It is tokenised once, into a file that every rank maps into
memory (`cache` says when such a file is trusted), so that text may be larger than memory.
`hybrid.data.batches` decides which blocks a rank sees at a step.

Packing: an end token follows each document, and each side begins with one. Documents come one after
another, so a block may hold parts of several. Empty documents are left out. Text is tokenised in
pieces of at most 256 KiB, cut after the end of a line where there is one.

Split: whole documents go to validation by the hash of their text (`plan_documents` has the rule).
The split does not depend on a seed, a rank, the files' names or their order, and copies of a
document are on one side. A single document is cut in two."""

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from ...job.reading import show_key
from ...launch.ops_cache import cache_folder
from ..targets import IGNORED_TARGET
from .cache import Side, TokenFile, open_tokens, write_tokens
from .documents import plan_documents
from .sources import Rows, Source, absolute, find_files, stamp, standard_library
from .tokenizers import BYTES, files_of, load_tokenizer

FORMAT = 1  # of the token files; a file of another format is not used
CONTEXT = 256


class Blocks:
    """Gives one side's text as a map-style set of `(input, target)`, int64 [context] each.

    Block i has the tokens from i * context on, and as target each one's next token, so that each
    token but the first is a target once. The last block is filled up with input 0 and target -100.

    vocab_size: all ids are below it. num_tokens: targets that count. num_bytes: UTF-8 bytes of the
    text (bits per byte are loss * num_tokens / num_bytes / ln 2). fingerprint: the tokens' SHA-256,
    hexadecimal. targets_per_sample: context, or None where the last block is filled up."""

    def __init__(self, tokens: numpy.ndarray, context: int, vocab_size: int, side: Side) -> None:
        self._tokens, self.context, self.vocab_size = tokens, context, vocab_size
        self.num_tokens = side.num_tokens - 1
        self.num_bytes, self.num_documents = side.num_bytes, side.num_documents
        self.fingerprint = side.fingerprint
        self.targets_per_sample = None if self.num_tokens % context else context

    def __len__(self) -> int:
        return -(-self.num_tokens // self.context)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = range(len(self))[i] * self.context
        block = torch.from_numpy(self._tokens[start : start + self.context + 1].astype("int64"))
        missing = self.context + 1 - len(block)
        if missing == 0:
            return block[:-1], block[1:]
        pad = torch.nn.functional.pad
        return pad(block[:-1], (0, missing)), pad(block[1:], (0, missing), value=IGNORED_TARGET)


def text(
    path: str | None = None,
    dataset: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    validation_split: str | None = None,
    field: str | None = None,
    tokenizer: str = BYTES,
    context: int = CONTEXT,
    validation: float | None = None,
    max_bytes: int | None = None,
    cache: str | None = None,
) -> tuple[Blocks, Blocks]:
    """Returns train and validation blocks of `context` tokens.

    path: a UTF-8 text file, a folder (all files below it that are not hidden) or a pattern; each
    file is a document. dataset: a hub name, or a local file or folder that `datasets` reads, with
    its `subset`, `split` ("train") and `field` ("text"); each row is a document. With neither, the
    text is the standard library's *.py files without tests, generated files and files that are not
    UTF-8. It depends on the running interpreter; `fingerprint` tells one text from another.
    tokenizer: "bytes" (256 values and an end token, 256), a folder, a tokenizer.json, a hub name.
    validation: share of the bytes, by default 0.1. Instead, `validation_split` names a split of the
    data set; train documents that it has too are left out.
    max_bytes: of each split, use only the first documents that have at most so many bytes together.
    cache: folder for token files, by default hybrid/text in XDG_CACHE_HOME or in ~/.cache.

    Raises ValueError, which names the option, or ModuleNotFoundError where `datasets` is missing.
    """
    options: dict[str, Any] = {key: value for key, value in locals().items() if value is not None}
    _check(options)
    found = _token_file(options)
    train, held = [
        Blocks(tokens, context, found.vocab_size, side)
        for tokens, side in zip(found.tokens, found.sides, strict=True)
    ]
    if train.num_tokens < context:
        raise ValueError(
            f"context = {context}: longer than the train text, of {train.num_tokens} tokens"
        )
    return train, held


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError where `text` would refuse these options; no file is looked at."""
    known = list(inspect.signature(text).parameters)
    if wrong := [name for name in options if name not in known]:
        raise ValueError(f"{show_key(wrong[0])}: unknown; valid: {', '.join(known)}")
    _check({name: value for name, value in options.items() if value is not None})


def _check(options: dict[str, Any]) -> None:
    """Raises ValueError where an option has a wrong type or value, or has no effect."""
    for name, value in options.items():
        if name in ("context", "max_bytes"):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r}: a whole number, 1 or more, is needed")
        elif name == "validation":
            if type(value) is not float or not 0 < value < 1:
                raise ValueError(f"{name} = {value!r}: a number between 0 and 1 is needed")
        elif not isinstance(value, str) or not value:
            raise ValueError(f"{name} = {value!r}: a text is needed")
    if "path" in options and "dataset" in options:
        raise ValueError(f"path = {options['path']!r}: and a dataset; one of them is needed")
    if "validation" in options and "validation_split" in options:
        raise ValueError("validation has no effect with validation_split; leave one out")
    for name in ("subset", "split", "validation_split", "field"):
        if name in options and "dataset" not in options:
            raise ValueError(f"{name} = {options[name]!r}: has no effect without dataset")


def _token_file(options: dict[str, Any]) -> TokenFile:
    """Opens the token file of these options; the text is tokenised unless the cache has it."""
    try:
        sources = _sources(options)
        return _open(_file_name(options, sources), options, sources)
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        raise ValueError(f"text cannot be read, or its tokens not kept: {reason}") from None


def _open(file: Path, options: dict[str, Any], sources: Sequence[Source]) -> TokenFile:
    """Opens a token file, and writes it anew where the sources or the tokenizer have changed."""
    name = options["tokenizer"]

    def state() -> str:
        tokenizer = [stamp(map(str, files_of(name))), name == BYTES or version("tokenizers")]
        return _hash([FORMAT, [s.state() for s in sources], tokenizer])

    before = state()

    def build(file: Path) -> None:
        tokenizer = load_tokenizer(name)
        plan = plan_documents(sources, options.get("validation", 0.1), options.get("max_bytes"))
        write_tokens(file, before, sources, plan, tokenizer)
        if state() != before:
            file.unlink()
            raise ValueError(f"{sources[0].what}: changed while it was read")

    return open_tokens(file, before, build)


def _file_name(options: dict[str, Any], sources: Sequence[Source]) -> Path:
    """Names one file for the same options, so that changed text replaces its old tokens."""
    keys = ("subset", "field", "split", "validation_split", "validation", "max_bytes")
    named = [options.get(key) for key in keys]
    named += [_absolute(options.get("dataset")), _absolute(options["tokenizer"])]
    if "path" in options:
        named.append(absolute(options["path"]))
    elif "dataset" not in options:
        named.append(sources[0].what)
    folder = options.get("cache") or cache_folder() / "text"
    return Path(os.path.expanduser(folder)) / f"{_hash([FORMAT, *named])[:32]}.tokens"


def _sources(options: dict[str, Any]) -> Sequence[Source]:
    """Returns one source, which is to be split, or a train and a validation source."""
    if "path" in options:
        return [find_files(options["path"])]
    if "dataset" not in options:
        return [standard_library()]
    splits = [options.get("split", "train")]
    splits += [options["validation_split"]] if "validation_split" in options else []
    subset, field = options.get("subset"), options.get("field", "text")
    return [Rows(options["dataset"], subset, split, field) for split in splits]


def _absolute(name: str | None) -> str | None:
    """Makes a local name the same from every working folder; a hub's name stays as it is."""
    return absolute(name) if name and os.path.exists(absolute(name)) else name


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
