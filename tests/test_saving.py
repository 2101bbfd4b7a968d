"""A save is whole or leaves nothing, whichever rank cannot do its part, and old ones stay."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.checkpoint import flushing, folders, save, tensors
from hybrid.checkpoint.folders import list_checkpoints, prune, remove_unfinished, step_of, verify
from hybrid.checkpoint.pieces import WEIGHT, Piece, shares_of
from hybrid.checkpoint.save import StateHashes
from hybrid.checkpoint.snapshot import Snapshot
from hybrid.job.errors import NoRoom, RunError, exit_status
from tests.saving_ranks import RANKS, VALUES, Ranks, names, only_error, pieces, save_all

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_save_is_whole_and_in_the_promised_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the disk before what: the files, the manifest, the folder, its name."""
    done: list[tuple[str, str]] = []

    def note(name: str) -> None:
        real = getattr(os, name)

        def noting(what: Any, *rest: Any) -> Any:
            shown = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
            done.append((name, Path(shown).name))
            return real(what, *rest)

        monkeypatch.setattr(os, name, noting)

    monkeypatch.setattr(flushing, "FLUSH_EVERY_S", 60.0)  # so that a slow write is flushed once
    for name in ("fsync", "fdatasync", "rename"):
        note(name)
    folder = tmp_path / "out" / "checkpoints"
    (saved,) = set(save_all(folder, 3))
    part = "step-00000003.part"
    files = [("fdatasync", f"rank{rank:05d}.safetensors") for rank in range(RANKS)]
    assert done[:2] == [("fsync", "out"), ("fsync", tmp_path.name)]
    assert sorted(done[2:6]) == files
    manifest = [("fsync", "manifest.json"), ("fsync", part)]
    assert done[6:] == [*manifest, ("rename", part), ("fsync", "checkpoints")]
    found, problems = verify(folder / "step-00000003", whole=True)
    assert problems == [] and found is not None and found.state_hash == saved.state_hash


def write_fails(monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception) -> None:
    """Have a rank's file fail after its first block."""
    blocks = tensors._blocks_of

    def failing(parts: Any) -> Iterator[Any]:
        yield from blocks(parts[:1])
        if any(part.key == f"weight/b@{11 * rank // RANKS}" for part in parts):
            raise error
        yield from blocks(parts[1:])

    monkeypatch.setattr(tensors, "_blocks_of", failing)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("error", "kind", "words", "status"),
    [
        (FULL, NoRoom, "{out}: cannot be written to: No space left on device (rank {rank} on ", 3),
        (OSError(errno.EFBIG, "File too large"), NoRoom, "File too large (rank {rank} on ", 3),
        (OSError(errno.EIO, "Input/output error"), RunError, "after 4 steps: Input/output e", None),
        (MemoryError(), RunError, "after 4 steps: MemoryError", None),
    ],
)
def test_one_rank_that_cannot_write_ends_all(
    rank: int,
    error: Exception,
    kind: type[Exception],
    words: str,
    status: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_all(tmp_path, 2)
    monkeypatch.setattr("hybrid.job.errors.users_line", lambda error: "")
    with monkeypatch.context() as patch:
        write_fails(patch, rank, error)
        found = save_all(tmp_path, 4)
    said = only_error(found, kind)
    assert words.format(out=tmp_path, rank=rank) in said and f"rank {rank} on " in said
    assert exit_status(found[0]) == status
    assert names(tmp_path) == ["step-00000002"] and verify(tmp_path / "step-00000002")[1] == []
    assert isinstance(save_all(tmp_path, 4)[3], StateHashes)


def test_a_limit_of_the_system_while_writing(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the manifest is longer than a rank's file, and does not fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        found = save_all(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large (rank 0 on " in only_error(found, NoRoom)
    assert names(tmp_path) == []


def test_a_folder_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    write = save.write_file

    def removing(path: Path, parts: Any) -> Any:
        found = write(path, parts)
        if path.name == "rank00002.safetensors":
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(save, "write_file", removing)
    words = only_error(save_all(folder, 2), RunError)
    assert words.startswith("rank ") and "could not save the state after 2 steps: " in words


def test_hosts_that_do_not_share_the_file_system(tmp_path: Path) -> None:
    """Rank 3 writes elsewhere: into no folder, or into one that an earlier run has left there."""
    here, there = tmp_path / "here", tmp_path / "there"
    each = {0: here, 1: here, 2: here, 3: there}
    words = only_error(save_all(each, 2), RunError)
    assert words.startswith("rank 3 on ") and words.endswith(save.SHARED)
    (there / "step-00000002.part").mkdir(parents=True)
    words = only_error(save_all(each, 2), RunError)
    assert "it does not see what rank 3 on " in words and words.endswith(save.SHARED)
    assert names(here) == [] and names(there / "step-00000002.part") == []


def test_a_folder_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    words = only_error(save_all(tmp_path / "checkpoints", 2), RunError)
    assert words.startswith("rank 0 on ")


def test_a_state_that_did_not_change_is_no_checkpoint(tmp_path: Path) -> None:
    first = save_all(tmp_path, 2)[0]
    assert save_all(tmp_path, 4, seed=1, unlike=first)[0] != first
    words = only_error(save_all(tmp_path, 6, unlike=first), RunError)
    assert "it is the state of the checkpoint before, bit for bit" in words
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_pieces_that_leave_a_hole_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks()

    def work(rank: int) -> StateHashes:
        held = [p for p in pieces(rank) if (rank, p.name) != (2, "b")]
        shares = shares_of(held)
        lacking = Snapshot(2, shares, {}, {}, VALUES)
        return save.save(tmp_path, lacking, rank, ranks.gather(rank))

    assert "b weight: element 5 stands nowhere" in only_error(ranks.run(work), RunError)
    assert names(tmp_path) == []


def test_a_replaced_checkpoint_is_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tmp_path, 2)
    rename = os.rename

    def stops(source: Any, target: Any) -> None:
        if Path(source).name == "step-00000002.part":
            raise KeyboardInterrupt  # as if the process ended here
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stops)
        with pytest.raises(KeyboardInterrupt):
            alone = Snapshot(
                2, shares_of([Piece("a", WEIGHT, (3,), torch.ones(3))]), {}, {}, VALUES
            )
            save.save(tmp_path, alone, 0, lambda value: [value])
    assert names(tmp_path) == ["step-00000002.old.part", "step-00000002.part"]
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["step-00000002"] and verify(tmp_path / "step-00000002")[1] == []
    assert isinstance(save_all(tmp_path, 2, seed=1)[0], StateHashes)
    assert names(tmp_path) == ["step-00000002"]


def test_what_is_pruned_loses_its_name_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (2, 4, 6, 8, 10):
        save_all(tmp_path, step)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
    prune(tmp_path, 2, kept=[4], newest=8)
    left = [step_of(path) for path in list_checkpoints(tmp_path)]
    assert left == [8, 6, 4], "step 10 is of an earlier run, which went on from there"
    assert {n for n in names(tmp_path) if n.endswith(".part")} == {
        "step-00000002.part",
        "step-00000010.part",
    }
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 6, 8)]


def test_old_checkpoints_that_cannot_be_removed_end_the_run_and_lose_nothing(
    tmp_path: Path,
) -> None:
    def tidy() -> None:
        raise OSError(errno.EIO, "Input/output error")

    assert "Input/output error" in only_error(save_all(tmp_path, 2, tidy=tidy), RunError)
    assert verify(tmp_path / "step-00000002")[1] == []
