"""Where text comes from, as a stream of documents: files, the standard library, `datasets`.

A document is a name and chunks of bytes, never held whole. A source gives the same documents in the
same order each time, and a `state` that is quick to compute and changes when its text may have.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

CHUNK = 1 << 18  # bytes read at once
ROWS = 64  # rows of a data set read at once
# What lies among the standard library's files and is not its text, or is one build's alone.
LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__")
GENERATED = ("_sysconfigdata", "config-")  # paths and compiler flags

Document = tuple[str, Iterable[bytes]]


class Source(Protocol):
    """`what` names the source in messages; `lenient`: text that is not UTF-8 is left out."""

    @property
    def what(self) -> str: ...

    @property
    def lenient(self) -> bool: ...

    def state(self) -> str:
        """Changes when the text may have."""
        ...

    def documents(self) -> Iterator[Document]:
        """All documents, in order."""
        ...


@dataclasses.dataclass(frozen=True)
class Files:
    """Each file is a document. Paths are plain text: there may be many."""

    what: str
    files: tuple[str, ...]
    lenient: bool = False

    def state(self) -> str:
        """See `Source`, and `stamp`."""
        return stamp(self.files)

    def documents(self) -> Iterator[Document]:
        """See `Source`."""
        for file in self.files:
            yield file, _chunks(file)


def _chunks(file: str) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def stamp(files: Iterable[str]) -> str:
    """Hash of the files' names, sizes and times of modification and of change (the latter is set by
    the kernel alone, so that a file put back with its old time is noticed). Content is not read."""
    digest = hashlib.sha256()
    for file in files:
        s = os.stat(file)
        digest.update(f"{file}\0{s.st_size}\0{s.st_mtime_ns}\0{s.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def find_files(path: str) -> Files:
    """The file `path`; or all files below a folder that are not hidden; or those that match a
    pattern (`**` for any folders). In the order of their names. ValueError where there is none."""
    what, given = f"path = {path!r}", os.path.abspath(os.path.expanduser(path))
    if os.path.isfile(given):
        return Files(what, (given,))
    if os.path.isdir(given):
        found = _walk(given, lambda name: not name.startswith("."))
    else:
        found = glob.iglob(given, recursive=True)
    files = sorted(filter(os.path.isfile, found))
    if not files:
        raise ValueError(f"{what}: no file; valid: a text file, a folder of them, or a pattern")
    return Files(what, tuple(files))


def standard_library() -> Files:
    """The Python source text of the running interpreter's standard library, without its tests,
    installed packages and what its build generated."""
    root = sysconfig.get_path("stdlib")

    def wanted(name: str) -> bool:
        return name not in LEFT_OUT and not name.startswith(GENERATED)

    files = sorted(file for file in _walk(root, wanted) if file.endswith(".py"))
    if not files:
        raise ValueError(f"path is left out, and the standard library has no source text in {root}")
    return Files(f"the standard library in {root}", tuple(files), lenient=True)


def _walk(root: str, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Files below a folder, none in folders or of names that are not `wanted`; links to folders are
    not followed."""

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = filter(wanted, folders)
        yield from (os.path.join(folder, name) for name in filter(wanted, names))


@dataclasses.dataclass(frozen=True)
class Rows:
    """One split of a data set of the `datasets` library; each row's `field` is a document."""

    name: str
    subset: str | None
    split: str
    field: str
    lenient: bool = False

    @property
    def what(self) -> str:
        """See `Source`."""
        return f"dataset = {self.name!r}, split = {self.split!r}"

    def state(self) -> str:
        """See `Source`. A hub's data set is taken as unchanged: the hub is not asked again."""
        local = os.path.abspath(os.path.expanduser(self.name))
        if not os.path.exists(local):
            return "hub"
        if os.path.isfile(local):
            return stamp([local])
        return stamp(sorted(_walk(local, lambda name: not name.startswith("."))))

    def documents(self) -> Iterator[Document]:
        """See `Source`."""
        rows = self._load()
        if self.field not in (rows.column_names or ()):
            names = ", ".join(rows.column_names or ())
            raise ValueError(f"{self.what}: field = {self.field!r}: no such column; valid: {names}")
        number = 0
        for batch in rows.select_columns([self.field]).iter(batch_size=ROWS):
            for text in batch[self.field]:
                if not isinstance(text, str):
                    kind = type(text).__name__
                    raise ValueError(
                        f"{self.what}: field = {self.field!r}: row {number} holds {kind}, not text"
                    )
                yield f"row {number}", (text.encode(errors="surrogatepass"),)
                number += 1

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise ModuleNotFoundError(
                f"dataset = {self.name!r}: needs the datasets package; pip install datasets"
            ) from error
        try:
            return _load_rows(datasets, self.name, self.subset, self.split)
        except Exception as error:  # the library raises many kinds, of many lines
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{self.what}: cannot be loaded: {reason}") from None


def _load_rows(datasets: Any, name: str, subset: str | None, split: str) -> Any:
    """By `load_from_disk` what `save_to_disk` wrote, by `load_dataset` other files and names."""
    local = Path(name).expanduser()
    if (local / "state.json").is_file():
        if split != "train" or subset is not None:
            raise ValueError("it was saved without splits and subsets")
        return datasets.load_from_disk(str(local))
    if (local / "dataset_dict.json").is_file():
        splits = datasets.load_from_disk(str(local))
        if split not in splits:
            raise ValueError(f"no such split; valid: {', '.join(splits)}")
        return splits[split]
    if local.is_file():
        files = [local.name]
        return datasets.load_dataset(str(local.parent), subset, data_files=files, split=split)
    return datasets.load_dataset(str(local) if local.exists() else name, subset, split=split)
