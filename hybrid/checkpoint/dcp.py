"""Reads the weights in a folder of torch.distributed.checkpoint (DCP), without running its pickles.

Its `.metadata` says which shards of which tensors stand where in the `.distcp` files; each shard is
a small file of torch.save there. Source: torch/distributed/checkpoint/filesystem.py."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..job.errors import JobError
from .pickled import INNER, Makers, load, load_bare
from .sources import Form


def open_dcp(folder: Path) -> Makers:
    """Return a maker of each tensor of the model; raises JobError.

    Where the saved dictionary has one for the optimizer too, that is left out."""
    metadata = load_bare(folder / ".metadata")
    places: dict[str, dict[tuple[int, ...], Any]] = {}
    for index, info in metadata.storage_data.items():
        offset = tuple(index.__dict__.get("offset") or ())
        places.setdefault(index.fqn, {})[offset] = info
    named = _of_the_model(folder, metadata)
    found: dict[str, tuple[Form, Callable[[], torch.Tensor]]] = {}
    for name, key in named.items():
        about = metadata.state_dict_metadata[key]
        chunks = [(tuple(c.offsets), tuple(c.sizes)) for c in about.chunks]
        form = Form(_dtype(about.properties), tuple(about.size))
        found[name] = form, _Whole(folder, key, form, chunks, places[key])
    return found


def _dtype(properties: Any) -> torch.dtype:
    state = properties.state
    found = state["dtype"] if isinstance(state, dict) else state[0]
    if not isinstance(found, torch.dtype):
        raise ValueError(f"a dtype is {found!r}")
    return found


def _of_the_model(folder: Path, metadata: Any) -> dict[str, str]:
    """Return DCP's keys of the model's tensors, by their names in the model."""
    paths = metadata.__dict__.get("planner_data") or {}
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for key, about in metadata.state_dict_metadata.items():
        if "chunks" in about.__dict__:
            *outer, name = (str(part) for part in paths.get(key, (key,)))
            groups.setdefault(tuple(outer), {})[name] = key
    models = [outer for outer in groups if outer and outer[-1] in INNER]
    if not models and () in groups:
        models = [()]
    if len(models) != 1:
        names = ", ".join(".".join(outer) or "the top" for outer in groups) or "nothing"
        raise JobError(f"{folder}: holds no one model; tensors stand under: {names}")
    return groups[models[0]]


class _Whole:
    """Makes a whole tensor of its shards."""

    def __init__(
        self,
        folder: Path,
        key: str,
        form: Form,
        chunks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        places: dict[tuple[int, ...], Any],
    ) -> None:
        self.folder, self.key, self.form = folder, key, form
        self.chunks, self.places = chunks, places

    def __call__(self) -> torch.Tensor:
        if sum(torch.Size(sizes).numel() for _, sizes in self.chunks) != self.form.size:
            raise JobError(f"{self.folder}: the shards of {self.key} do not make it up")
        whole = torch.empty(self.form.shape, dtype=self.form.dtype)
        for offsets, sizes in self.chunks:
            part = self._shard(self.places[offsets])
            if tuple(part.shape) != sizes or part.dtype != self.form.dtype:
                raise JobError(f"{self.folder}: a shard of {self.key} has another form")
            box = tuple(slice(low, low + n) for low, n in zip(offsets, sizes, strict=True))
            whole[box] = part
        return whole

    def _shard(self, info: Any) -> torch.Tensor:
        name = str(info.relative_path)
        if Path(name).name != name or not name.endswith(".distcp"):
            raise JobError(f"{self.folder}: {name!r} is no name of a .distcp file in it")
        with (self.folder / name).open("rb") as file:
            file.seek(info.offset)
            content = file.read(info.length)
        found = load(io.BytesIO(content), str(self.folder / name))
        if not isinstance(found, torch.Tensor):
            raise JobError(f"{self.folder}: {name} holds a {type(found).__name__}, not a tensor")
        return found
