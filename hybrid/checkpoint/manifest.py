"""Defines the manifest of a checkpoint, format 1, and reads it without trusting it. No torch here.

The manifest is compact JSON with sorted keys. Its `sha256` is that of the same text without this
key. docs/checkpoints.md describes every key."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..job.errors import JobError
from ..job.reading import read_json
from ..launch.serialization import sendable

FORMAT = 1
LONGEST = 2**28  # bytes of a manifest: about a million pieces
MANIFEST = "manifest.json"
WEIGHT = "weight"  # the key of a parameter's or a buffer's value; others are the optimizer's
KEYS = (
    "step", "samples", "strategy", "layout", "world_size", "job", "versions", "rng", "loss_scale",
    "state_hash", "tensors", "files",
)  # fmt: skip
_WRONG = ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError
RANK_FILE = re.compile(r"rank[0-9]{5}\.safetensors")


SHA256 = r"^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Strict):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=SHA256)


class _Own(_Strict):
    key: str
    dtype: str
    shape: list[Annotated[int, Field(ge=0)]]


class _Rank(_Strict):
    numbers: dict[str, Any]
    tensors: dict[str, _Own]


class _Head(_Strict):
    """Says of which types the manifest's values are, but for its tensors."""

    step: int = Field(ge=0)
    samples: int = Field(ge=0)
    strategy: str
    layout: dict[str, int]
    world_size: int = Field(ge=1)
    job: dict[str, Any]
    versions: dict[str, str]
    loss_scale: dict[str, float] | None
    state_hash: str = Field(pattern=SHA256)
    tensors: dict[str, dict[str, dict[str, Any]]]
    files: dict[str, _File]
    ranks: list[_Rank] = []


class BadManifest(ValueError):
    """Says in one line what is wrong with a manifest; the line begins with `manifest.json`."""


@sendable
class FilePiece(NamedTuple):
    """Tells where a part of a canonical tensor stands in a file.

    Elements `start` to `start + size` of it are the tensor `key` of `file`; or that is the box at
    `offsets` of `sizes`, row by row."""

    file: str
    key: str
    start: int
    size: int
    box: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@sendable
class Entry(NamedTuple):
    """Describes one canonical tensor: its dtype as safetensors writes it, its shape, its parts."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[FilePiece]

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@sendable
class Manifest(NamedTuple):
    """Holds a manifest: its values as they stand, and its tensors by name and key."""

    values: Mapping[str, Any]
    entries: Mapping[tuple[str, str], Entry]

    @property
    def step(self) -> int:
        """Return the number of optimizer steps done."""
        return int(self.values["step"])

    @property
    def state_hash(self) -> str:
        """Return the hash of the whole state."""
        return str(self.values["state_hash"])

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all files of tensors."""
        return sum(file["bytes"] for file in self.values["files"].values())


def order_of(name: str, key: str) -> tuple[str, bool, str]:
    """Return what sorts canonical tensors: by name, the weight first, then its other keys."""
    return name, key != WEIGHT, key


def rank_file(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank{rank:05d}.safetensors"


def compact(value: Any) -> str:
    """Return JSON in the form in which hashes are taken of it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def seal(values: Mapping[str, Any]) -> str:
    """Return the text of a manifest, with the hash of itself."""
    digest = hashlib.sha256(compact(values).encode()).hexdigest()
    return compact({**values, "sha256": digest})


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest in a checkpoint's folder; raises BadManifest."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise BadManifest(f"{MANIFEST}: is no regular file")
    try:
        values = read_json(path, MANIFEST, LONGEST)
    except JobError as error:
        raise BadManifest(str(error)) from None
    try:
        return _check(values, folder)
    except BadManifest:
        raise
    except _WRONG as error:
        raise BadManifest(f"{MANIFEST}: is no manifest of a checkpoint: {error!r}") from None


def _check(values: Any, folder: Path) -> Manifest:
    if not isinstance(values, dict):
        raise BadManifest(f"{MANIFEST}: is no JSON object")
    if values.get("format") != FORMAT:
        raise BadManifest(f"{MANIFEST}: format = {values.get('format')!r}; valid: {FORMAT}")
    stated = values.pop("sha256", None)
    if stated != hashlib.sha256(compact(values).encode()).hexdigest():
        raise BadManifest(f"{MANIFEST}: is damaged, its SHA-256 is not the one that it states")
    if missing := [key for key in KEYS if key not in values]:
        raise BadManifest(f"{MANIFEST}: has no {missing[0]!r}")
    _check_head(values)
    whole = all(_size(folder / name) == file["bytes"] for name, file in values["files"].items())
    entries = {}
    for name, keys in values["tensors"].items():
        for key, value in keys.items():
            entries[name, key] = entry = _entry(value, values["files"])
            # Where a file has another size, `verify` says so, and no piece is worth looking at.
            if whole and (problem := uncovered(entry)):
                raise BadManifest(f"{MANIFEST}: {name} {key}: {problem}")
    return Manifest(values, entries)


def _check_head(values: Mapping[str, Any]) -> None:
    """Raise BadManifest unless the values have their types, and the files names of ours."""
    try:
        _Head.model_validate(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise BadManifest(f"{MANIFEST}: {where}: {error.errors()[0]['msg']}") from None
    for name in values["files"]:
        if not RANK_FILE.fullmatch(name):
            raise BadManifest(f"{MANIFEST}: files: {name!r} is no file of a rank")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _entry(value: Mapping[str, Any], files: Mapping[str, Any]) -> Entry:
    shape = tuple(int(n) for n in value["shape"])
    if any(n < 0 for n in shape):
        raise ValueError(f"a negative size: {shape}")
    pieces = []
    for piece in value["pieces"]:
        if piece["file"] not in files:
            raise ValueError(f"{piece['file']!r} is not among the files")
        if "flat" in piece:
            start, count = map(int, piece["flat"])
            pieces.append(FilePiece(piece["file"], piece["key"], start, count))
            _require_room(pieces[-1], files)
            continue
        offsets, sizes = (tuple(int(n) for n in part) for part in piece["box"])
        fits = zip(offsets, sizes, shape, strict=True)
        if not all(low >= 0 and n >= 0 and low + n <= whole for low, n, whole in fits):
            raise ValueError(f"a box outside the tensor: {offsets}, {sizes}")
        box = offsets, sizes
        pieces.append(FilePiece(piece["file"], piece["key"], 0, math.prod(sizes), box))
        _require_room(pieces[-1], files)
    return Entry(str(value["dtype"]), shape, pieces)


def _require_room(piece: FilePiece, files: Mapping[str, Any]) -> None:
    """Raise ValueError for a piece of more elements than its file has bytes."""
    if not 0 <= piece.size <= files[piece.file]["bytes"]:
        raise ValueError(
            f"{piece.key!r} has {piece.size} elements, more than {piece.file} can hold"
        )


def tensors_as_json(tensors: Mapping[tuple[str, str], Entry]) -> dict[str, dict[str, Any]]:
    """Return canonical tensors, whose pieces are flat ranges, as the manifest has them."""
    found: dict[str, dict[str, Any]] = {}
    for (name, key), entry in tensors.items():
        pieces = sorted(entry.pieces, key=lambda place: place.start)
        places = [{"file": p.file, "key": p.key, "flat": [p.start, p.size]} for p in pieces]
        value = {"dtype": entry.dtype, "shape": list(entry.shape), "pieces": places}
        found.setdefault(name, {})[key] = value
    return found


def rows_of(piece: FilePiece, shape: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield the contiguous ranges of a piece; of a box, a row each.

    A range is the start in the tensor, the start in the piece, and the number of elements."""
    if piece.box is None or not shape:
        yield piece.start, 0, piece.size
        return
    offsets, sizes = piece.box
    if piece.size == 0:
        return
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    width = sizes[-1]
    for row in range(piece.size // width):
        place, rest = offsets[-1], row
        for axis in range(len(shape) - 2, -1, -1):
            rest, index = divmod(rest, sizes[axis])
            place += (offsets[axis] + index) * strides[axis]
        yield place, row * width, width


def uncovered(entry: Entry) -> str | None:
    """Say which elements of a tensor no piece has, or two have; None: each stands once."""
    ranges = sorted(
        (start, count) for piece in entry.pieces for start, _, count in rows_of(piece, entry.shape)
    )
    end = 0
    for start, count in ranges:
        if count < 0 or (start != end and count):
            return f"element {min(start, end)} stands {'twice' if start < end else 'nowhere'}"
        end += count
    return None if end == entry.size else f"has {end} of {entry.size} elements"
