"""Opens the weights in a file or a folder, of ours or of another tool, and reads them by name.

What can be read: a checkpoint of ours, a run's folder, its final weights, a file of safetensors, an
index of several, a Hugging Face folder. Pickles (`hybrid.checkpoint.pickled`) only where they are
trusted. Values are read a range at a time, so that no second copy of a model is in memory."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..job.errors import JobError
from ..job.reading import read_json
from .folders import find_unless_final, verify
from .inspection import is_checkpoint
from .load import Reader
from .manifest import Manifest
from .names import CHECKPOINTS
from .pieces import WEIGHT
from .tensor_file import Damaged, TensorFile
from .tensors import dtype_of, read
from .weights import ABOUT, FILE, verify_weights

INDEX = ".safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.distcp", ".metadata", "*.bin.index.json")
VALID = (
    "valid: a file or folder of safetensors, a Hugging Face folder, a checkpoint, a run's folder"
)


class Form(NamedTuple):
    """Describes a tensor that a source has."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


class Weights(Protocol):
    """Is an open source of weights.

    where: names it in errors. kind: in a word."""

    where: str
    kind: str

    @property
    def about(self) -> Mapping[str, Any]:
        """Return what is known of it, for the record."""

    @property
    def tensors(self) -> Mapping[str, Form]:
        """Return the form of each tensor by its name."""

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return elements of a flattened tensor, 1-D on the CPU."""

    def close(self) -> None:
        """Close the files."""


class CheckpointWeights:
    """Reads the weights, and no more, of a checkpoint of ours that has been verified."""

    kind = "checkpoint"

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.where, self._reader = str(folder), Reader(folder, manifest)
        self.about: Mapping[str, Any] = {
            "step": manifest.step,
            "state_hash": manifest.state_hash,
        }
        self.tensors: Mapping[str, Form] = {
            name: Form(dtype_of(entry.dtype), entry.shape)
            for (name, key), entry in manifest.entries.items()
            if key == WEIGHT
        }

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return elements of a flattened tensor, 1-D on the CPU."""
        return self._reader.read(name, WEIGHT, first, count)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()


class FileWeights:
    """Reads the tensors of files in the safetensors format.

    places: each tensor's file; left out, all tensors of the one file `where`."""

    kind = "safetensors"

    def __init__(self, where: Path, places: Mapping[str, Path] | None = None) -> None:
        self.where, self.about = str(where), dict[str, Any]()
        self._files: dict[Path, TensorFile] = {}
        if places is None:
            places = dict.fromkeys(self._file(where).spans, where)
        self._places = places
        self.tensors: dict[str, Form] = {}
        for name, path in places.items():
            span = self._file(path).spans.get(name)
            if span is None:
                raise JobError(f"{where}: {path.name} has no {name}, which the index places there")
            self.tensors[name] = Form(dtype_of(span.dtype), span.shape)

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            try:
                self._files[path] = TensorFile(path)
            except Damaged as error:
                raise JobError(f"{path.parent}: {error}") from None
            except OSError as error:
                raise JobError(f"{path}: cannot be read: {error.strerror}") from None
        return self._files[path]

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return elements of a flattened tensor, 1-D on the CPU."""
        return read(self._file(self._places[name]), name, first, count)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def open_weights(path: Path, trust_pickle: bool = False) -> Weights:
    """Open what a path has weights in; raises JobError where that is nothing that can be read.

    trust_pickle: pickles too, by torch's restricted loader."""
    if path.is_dir():
        if is_checkpoint(path):
            return open_checkpoint(path)
        if found := _of_run(path) or _of_safetensors(path):
            return found
    elif not path.is_file():
        raise JobError(f"{path}: there is no such file or folder; {VALID}")
    elif path.name.endswith(INDEX):
        return _of_index(path)
    elif path.suffix == ".safetensors":
        return FileWeights(path)
    if not holds_pickles(path):
        raise JobError(f"{path}: holds no weights that can be read; {VALID}")
    if not trust_pickle:
        raise JobError(
            f"{path}: its weights are pickled, and a pickle may name code to run; valid: "
            "safetensors, or --trust-pickle, for torch's loader that runs none"
        )
    from .pickled import open_pickled

    return open_pickled(path)


def open_checkpoint(folder: Path) -> CheckpointWeights:
    """Verify a checkpoint of ours, and open its weights; raises JobError where it is damaged."""
    manifest, problems = verify(folder)
    if manifest is None or problems:
        raise JobError(f"{folder}: cannot be used: {problems[0]}")
    return CheckpointWeights(folder, manifest)


def holds_pickles(path: Path) -> bool:
    """Tell whether a file, or one in a folder, is of a kind whose format is a pickle."""
    if path.is_dir():
        below = [path, *(p for p in path.iterdir() if p.is_dir())]  # DeepSpeed's folder of a tag
        return any(True for place in below for kind in PICKLES for _ in place.glob(kind))
    return any(path.match(kind) for kind in PICKLES)


def _of_run(path: Path) -> Weights | None:
    """Open the newest checkpoint of a run that is whole, else its final weights."""
    if (path / ABOUT).is_file():
        return open_final(path)
    below = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    found, problems = find_unless_final(below)
    if found:
        return CheckpointWeights(*found)
    if (below / "final" / ABOUT).is_file():
        return open_final(below / "final")
    if problems:
        raise JobError(f"{path}: no checkpoint can be used: {'; '.join(problems)}")
    return None


def open_final(folder: Path) -> FileWeights:
    """Open a run's final weights; raises JobError unless they are what was written."""
    found = FileWeights(verify_weights(folder))
    found.where, found.kind = str(folder), "final weights"
    about = read_json(folder / ABOUT, str(folder / ABOUT))
    found.about = {key: about[key] for key in ("step", "sha256") if key in about}
    return found


def _of_safetensors(path: Path) -> Weights | None:
    """Open the safetensors in a folder, such as Hugging Face's."""
    indices = sorted(path.glob(f"*{INDEX}"))
    files = sorted(path.glob("*.safetensors"))
    one = path / FILE
    if one in files:
        found: FileWeights | None = FileWeights(one)
    elif len(indices) > 1 or (not indices and len(files) > 1):
        names = ", ".join(file.name for file in indices or files)
        raise JobError(f"{path}: holds several: {names}; valid: the path of one of them")
    else:
        found = _of_index(indices[0]) if indices else FileWeights(files[0]) if files else None
    if found:
        found.where = str(path)
        found.kind = "Hugging Face folder" if (path / "config.json").is_file() else found.kind
    return found


def _of_index(path: Path) -> FileWeights:
    """Open the files that an index names, which must lie beside it."""
    index = read_json(path, str(path))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
        raise JobError(f"{path}: has no weight_map, which says in which file a tensor is")
    for name in places.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise JobError(f"{path}: {name!r} is no name of a file of safetensors beside it")
    return FileWeights(path, {key: path.parent / name for key, name in places.items()})
