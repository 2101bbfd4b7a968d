"""The format of checkpoints: any cut of a state reads back to the same bits and the same hash."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.checkpoint_damage import Damage, damages, make_run, try_one
from hybrid.checkpoint.file_hash import hash_of_files
from hybrid.checkpoint.folders import (
    list_checkpoints,
    prune,
    remove_unfinished,
    verify,
)
from hybrid.checkpoint.load import Reader, load
from hybrid.checkpoint.manifest import MANIFEST, BadManifest, read_manifest, seal
from hybrid.checkpoint.pieces import SHARED_FROM, Piece, shares_of
from hybrid.checkpoint.save import StateHashes, save
from hybrid.checkpoint.snapshot import Snapshot
from hybrid.checkpoint.state_hash import hash_of_pieces
from hybrid.checkpoint.tensor_file import Damaged, TensorFile
from hybrid.checkpoint.tensors import Part, write_file
from hybrid.job.errors import JobError
from hybrid.job.schema import Job
from tests.saving_ranks import Ranks

TENSORS = {
    ("1.bias", "weight"): torch.arange(101.0),
    ("1.bias", "exp_avg"): torch.randn(101),
    ("1.bias", "step"): torch.tensor(7.0),
    ("0.weight", "weight"): torch.randn(3, 5, 7),
    ("0.mask", "weight"): torch.tensor([True, False, True]),
    ("0.none", "weight"): torch.empty(0, 5),
    ("0.half", "weight"): torch.randn(13).bfloat16(),
    ("0.big", "weight"): torch.randn(3, SHARED_FROM),
}
VALUES = {"samples": 0, "strategy": "x", "layout": {}, "world_size": 3, "job": {}, "versions": {}}
VALUES |= {"rng": [], "loss_scale": None}


def hash_by_the_words() -> str:
    """The state hash as docs/checkpoints.md defines it, by nothing of hybrid's."""
    names = {torch.float32: "F32", torch.bool: "BOOL", torch.bfloat16: "BF16"}
    digest = hashlib.sha256()
    for name, key in sorted(TENSORS, key=lambda e: (e[0], e[1] != "weight", e[1])):
        tensor = TENSORS[name, key]
        shape = json.dumps(list(tensor.shape), separators=(",", ":"))
        digest.update(f"{name}\0{key}\0{names[tensor.dtype]}\0{shape}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def saved(folder: Path, ranks: int, draw: random.Random) -> Path:
    """Save the tensors as ranks that hold drawn pieces of them, one process in their place."""
    held: list[list[Piece]] = [[] for _ in range(ranks)]
    for (name, key), tensor in TENSORS.items():
        flat, shape = tensor.reshape(-1).clone(), tuple(tensor.shape)
        if draw.random() < 0.3:  # replicated
            for rank in range(ranks):
                held[rank].append(Piece(name, key, shape, tensor.clone(), 0, (rank, ranks)))
            continue
        cuts = sorted([0, len(flat), *(draw.randint(0, len(flat)) for _ in range(ranks - 1))])
        for rank, (first, end) in enumerate(itertools.pairwise(cuts)):
            if end > first or (rank == 0 and not len(flat)):
                held[rank].append(Piece(name, key, shape, flat[first:end], first))
    return saved_by(folder, held)


def saved_by(folder: Path, held: list[list[Piece]]) -> Path:
    """Save what each rank holds; the ranks are threads."""
    ranks = Ranks(len(held))

    def work(rank: int) -> StateHashes:
        snapshot = Snapshot(4, shares_of(held[rank]), {}, {}, VALUES)
        return save(folder, snapshot, rank, ranks.gather(rank))

    found = ranks.run(work)
    assert len(set(found)) == 1 and isinstance(found[0], StateHashes), found
    return folder / "step-00000004"


@pytest.mark.parametrize("seed", range(6))
def test_any_cut_has_the_same_hash_and_reads_back(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    folder = saved(tmp_path, draw.randint(1, 5), draw)
    manifest, problems = verify(folder, whole=True)
    assert manifest is not None and not problems
    assert manifest.state_hash == hash_by_the_words() == hash_of_files(folder, manifest)
    live = [Piece(n, k, tuple(t.shape), torch.zeros_like(t)) for (n, k), t in TENSORS.items()]
    load(folder, manifest, live)
    assert hash_of_pieces(live) == manifest.state_hash
    for piece in live:
        assert torch.equal(piece.tensor, TENSORS[piece.entry])
    for name in manifest.values["files"]:  # the library reads them too
        assert all(tensor.dim() == 1 for tensor in load_file(folder / name).values())


def test_boxes_are_read(tmp_path: Path) -> None:
    whole = torch.arange(4 * 6 * 5.0).view(4, 6, 5)
    folder = saved_by(tmp_path, [[Piece("w", "weight", (4, 6, 5), whole)]])
    values = json.loads((folder / MANIFEST).read_text())
    parts, pieces = [], []
    for a, b in ((0, 0), (0, 3), (2, 0), (2, 3)):
        box = whole[a : a + 2, b : b + 3].reshape(-1)
        parts.append(Part(f"{a}{b}", box.dtype, len(box), lambda i, n, box=box: box[i : i + n]))
        place = {"file": "rank00000.safetensors", "key": f"{a}{b}", "box": [[a, b, 0], [2, 3, 5]]}
        pieces.append(place)
    (folder / "rank00000.safetensors").unlink()
    about, flusher = write_file(folder / "rank00000.safetensors", parts)
    flusher.finish()
    values["files"]["rank00000.safetensors"] = about
    values["tensors"]["w"]["weight"]["pieces"] = pieces
    values.pop("sha256")
    (folder / MANIFEST).write_text(seal(values))
    manifest, problems = verify(folder, whole=True)  # the hash of the state is that of the flat one
    assert manifest is not None and not problems
    reader = Reader(folder, manifest)
    assert torch.equal(reader.whole("w", "weight"), whole)
    assert torch.equal(reader.read("w", "weight", 17, 61), whole.reshape(-1)[17:78])
    pieces.pop()
    (folder / MANIFEST).write_text(seal(values))
    with pytest.raises(BadManifest, match=r"w weight: (.* of 120 elements|.* stands nowhere)"):
        read_manifest(folder)


def test_what_is_missing_left_over_or_of_another_kind_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path, 2, random.Random(0))
    manifest = read_manifest(folder)
    live = [Piece(n, k, tuple(t.shape), torch.zeros_like(t)) for (n, k), t in TENSORS.items()]
    with pytest.raises(JobError, match=r"has the exp_avg of 1\.bias, which this run has not"):
        load(folder, manifest, [piece for piece in live if piece.key != "exp_avg"])
    more = Piece("2.bias", "weight", (3,), torch.zeros(3))
    with pytest.raises(JobError, match=r"has no weight of 2\.bias, which this run has"):
        load(folder, manifest, [*live, more])
    index = next(i for i, piece in enumerate(live) if piece.name == "0.half")
    other = [*live]
    other[index] = Piece("0.half", "weight", (13,), live[index].tensor.double())
    with pytest.raises(JobError, match=r"is BF16 \[13\] there and F64 \[13\] in this run"):
        load(folder, manifest, other)


def test_a_piece_that_is_not_contiguous_is_written_in_place() -> None:
    whole = torch.zeros(4, 6)
    piece = Piece("w", "weight", (6, 4), whole.t())
    piece.write(5, torch.ones(3))
    assert whole.t().reshape(-1).tolist() == [0.0] * 5 + [1.0] * 3 + [0.0] * 16


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x05",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}     ',
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F99","shape":[0],"data_offsets":[0,0]}}      ',
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}    ',
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "rank00007.safetensors").write_bytes(data)
    with pytest.raises(Damaged, match=r"^rank00007\.safetensors: is no safetensors file"):
        TensorFile(tmp_path / "rank00007.safetensors")


def test_checkpoints_are_listed_pruned_and_cleared(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000010", "step-00000100", "step-123456789"):
        (tmp_path / name).mkdir()
    for name in ("step-00000200.part", "step-00000002.old.part", "final", "step-x"):
        (tmp_path / name).mkdir()
    prune(tmp_path, 2, [2], newest=123456789)
    remove_unfinished(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-123456789",
        "step-00000100",
        "step-00000002",
    ]
    assert (tmp_path / "final").exists() and (tmp_path / "step-x").exists()
    assert not list(tmp_path.glob("*.part"))


def test_a_save_alone_returns_the_hash(tmp_path: Path) -> None:
    pieces = [Piece(n, k, tuple(t.shape), t) for (n, k), t in TENSORS.items()]
    snapshot = Snapshot(4, shares_of(pieces), {"rng/torch": torch.get_rng_state()}, {}, VALUES)
    found = save(tmp_path / "checkpoints", snapshot, 0, lambda value: [value])
    assert found.state_hash == hash_by_the_words()
    folder = list_checkpoints(tmp_path / "checkpoints")[0]
    assert not verify(folder, whole=True)[1]
    reader = Reader(folder, read_manifest(folder))
    assert torch.equal(reader.own(0)["rng/torch"], torch.get_rng_state())


def test_room_for_copies_is_touched_weights_first_and_until_it_is_needed() -> None:
    whole = [Piece("w", key, (5,), torch.ones(5)) for key in ("exp_avg", "exp_avg_sq", "weight")]
    snapshot = Snapshot(0, shares_of(whole), {}, {}, VALUES)
    answers = iter((False, True))
    snapshot.touch(lambda: next(answers))
    filled = {share.piece.key: bool(share.piece.tensor.any()) for share in snapshot.shares}
    assert filled == {"weight": False, "exp_avg": True, "exp_avg_sq": True}


def test_a_copied_snapshot_is_not_what_training_goes_on_to_change() -> None:
    tensor, seen, record = torch.zeros(5), [3], {"evals": [1]}
    shares = shares_of([Piece("w", "weight", (5,), tensor)])
    own = {"replica": tensor}
    copied = Snapshot(4, shares, own, {"seen": seen}, VALUES | {"record": record}).copy()
    tensor += 1
    seen[0] += 3
    record["evals"].append(2)
    assert copied.shares[0].read(0, 5).sum() == copied.own["replica"].sum() == 0
    assert copied.numbers == {"seen": [3]} and copied.values["record"] == {"evals": [1]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Job]]:
    """The folder of a run on three ranks with three checkpoints."""
    out = tmp_path_factory.mktemp("damage") / "run"
    yield out, make_run(out)


def test_every_damage_is_refused_by_the_files_name(run: tuple[Path, Job], tmp_path: Path) -> None:
    out, job = run
    kinds: dict[Any, Damage] = {}
    for damage in damages(out, 1, random.Random(3)):
        kinds.setdefault((damage.kind, damage.file == MANIFEST), damage)
    wrong = [(d.kind, d.file, try_one(out, tmp_path / "copy", job, d)) for d in kinds.values()]
    assert len(wrong) > 50 and [line for line in wrong if line[2]] == []
    whole = try_one(out, tmp_path / "copy", job, Damage("none", "", lambda folder: None))
    assert whole == "chose step-00000006"  # so the others were skipped for their damage
