"""Reads the pickled weights of other tools, by torch's loader that runs no code they name.

`torch.load(weights_only=True)` builds tensors and plain containers alone, and refuses every other
class. For the few classes that DeepSpeed's files and the `.metadata` of torch's distributed
checkpoints (DCP) have, it is given a stand-in that only holds values: neither library is imported.
https://docs.pytorch.org/docs/stable/notes/serialization.html#weights-only"""

import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..job.errors import JobError, first_line
from ..job.reading import read_json, read_text
from .pickle_protocol import in_protocol_2
from .sources import Form

INNER = ("module", "model", "state_dict", "model_state_dict")  # keys under which weights may stand
T = TypeVar("T")
Makers = Mapping[str, tuple[Form, Callable[[], torch.Tensor]]]


class Plain:
    """Stands for a class that a file names, and holds the values that it was pickled with."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)


_DCP = "torch.distributed.checkpoint"
STAND_INS: list[Any] = [
    (Plain, name)
    for name in (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.runtime.zero.config.OffloadDeviceEnum",
        f"{_DCP}.metadata.Metadata",
        f"{_DCP}.metadata.MetadataIndex",
        f"{_DCP}.metadata.TensorStorageMetadata",
        f"{_DCP}.metadata.BytesStorageMetadata",
        f"{_DCP}.metadata.ChunkStorageMetadata",
        f"{_DCP}.metadata.TensorProperties",
        f"{_DCP}.metadata.StorageMeta",
        f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
        f"{_DCP}.filesystem._StorageInfo",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "builtins.getattr",  # by which some pickles name an Enum's member; here it reads nothing
    )
]


class PickledWeights:
    """Reads tensors by name, of which it makes one at a time."""

    def __init__(self, where: Path, kind: str, makers: Makers) -> None:
        self.where, self.kind, self.about = str(where), kind, dict[str, Any]()
        self._makers = makers
        self.tensors = {name: form for name, (form, _) in makers.items()}
        self._made: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return elements of a flattened tensor, 1-D on the CPU."""
        if self._made is None or self._made[0] != name:
            form, make = self._makers[name]
            made = _tried(Path(self.where), make)
            if made.numel() != form.size:
                raise JobError(f"{self.where}: {name} is cut off")
            self._made = name, made.reshape(-1)
        return self._made[1][first : first + count]

    def close(self) -> None:
        """Free the last tensor."""
        self._made = None


def open_pickled(path: Path) -> PickledWeights:
    """Open a pickled file, or a folder of DeepSpeed's, of DCP's or of Hugging Face's.

    Raises JobError where torch's restricted loader refuses it, or it is none of these."""
    return _tried(path, lambda: _open(path))


def _tried(path: Path, read: Callable[[], T]) -> T:
    """Read something, and raise JobError for whatever else is raised: a file may hold anything."""
    try:
        return read()
    except JobError:
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {first_line(error)}"
        raise JobError(f"{path}: holds no weights in a form that is known: {words}") from None


def _open(path: Path) -> PickledWeights:
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _of_index(path)
        return PickledWeights(path, "pickled file", _by_name(_weights_in(path, load(path))))
    if (path / ".metadata").is_file():
        from .dcp import open_dcp

        return PickledWeights(path, "DCP folder", open_dcp(path))
    tag = _folder_of_tag(path)
    if any(tag.glob("*_model_states.pt")):
        from .zero_files import open_zero

        return PickledWeights(path, "DeepSpeed folder", open_zero(tag))
    for index in sorted(path.glob("*.bin.index.json")):
        return _of_index(index)
    files = [f for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in sorted(path.glob(kind))]
    files = [path / "pytorch_model.bin"] if (path / "pytorch_model.bin") in files else files
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise JobError(f"{path}: which file has its weights? found: {names}; valid: its path")
    return PickledWeights(path, "pickled file", _by_name(_weights_in(files[0], load(files[0]))))


def _folder_of_tag(path: Path) -> Path:
    """Return the folder that DeepSpeed's `latest` names; without it, the folder itself."""
    latest = path / "latest"
    name = read_text(latest, str(latest)).strip() if latest.is_file() else "."
    if name != "." and (Path(name).name != name or name == ".."):
        raise JobError(f"{path}: latest names no folder in it")
    return path / name


def load(source: Path | io.BytesIO, name: str = "") -> Any:
    """Return what torch's restricted loader reads; raises JobError with the reason it gives."""
    mapped = isinstance(source, Path) and zipfile.is_zipfile(source)
    try:
        # torch warns of pickles that it then reads or refuses: what is said of them is ours to say.
        with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped or None)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line]
        words = lines[0] if lines else first_line(error)
        raise JobError(f"{name or source}: torch's restricted loader refuses it: {words}") from None


def load_bare(path: Path) -> Any:
    """Return what is pickled in a file that is no archive of torch's, by the restricted loader.

    The loader takes archives and protocol 2 alone, so the pickle is put into such a one."""
    try:
        program = in_protocol_2(path.read_bytes())
    except ValueError as error:
        raise JobError(f"{path}: is no pickle that can be read: {first_line(error)}") from None
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/version", "3\n")
    archive.seek(0)
    return load(archive, str(path))


def _of_index(path: Path) -> PickledWeights:
    """Open the files that an index of Hugging Face's names, which must lie beside it."""
    index = read_json(path, str(path))
    found: dict[str, Any] = {}
    for name in sorted(set(index["weight_map"].values())):
        if Path(name).name != name:
            raise JobError(f"{path}: {name!r} is no name of a file beside it")
        found |= _weights_in(path.parent / name, load(path.parent / name))
    return PickledWeights(path, "pickled files", _by_name(found))


def _weights_in(path: Path, found: Any) -> dict[str, Any]:
    """Return the tensors by name in what a file held, alone or beside other things."""
    inner = [key for key in INNER if isinstance(found, dict) and isinstance(found.get(key), dict)]
    if inner:
        found = found[inner[0]]
    if not isinstance(found, dict) or not found:
        raise JobError(f"{path}: holds a {type(found).__name__}, not tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise JobError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
    return dict(found)


def _by_name(tensors: Mapping[str, torch.Tensor]) -> Makers:
    return {name: of_tensor(tensor) for name, tensor in tensors.items()}


def of_tensor(tensor: torch.Tensor) -> tuple[Form, Callable[[], torch.Tensor]]:
    """Return the form of a tensor that is there, and what returns it."""
    whole = tensor.detach()
    return Form(whole.dtype, tuple(whole.shape)), lambda: whole.contiguous()
