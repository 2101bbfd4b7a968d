"""Checkpoints for tests, saved by four ranks that are threads of this process, in no time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybrid.checkpoint.folders import folder_of
from hybrid.checkpoint.manifest import MANIFEST, seal
from hybrid.checkpoint.pieces import WEIGHT, Piece, shares_of
from hybrid.checkpoint.save import save
from hybrid.checkpoint.snapshot import Snapshot
from hybrid.job.file import to_dict
from hybrid.models import build_model

RANKS = 4


def save_checkpoint(run: Path, job: Any, step: int = 6, seed: int = 3) -> Path:
    """Save what a run of the job might have, in `run/checkpoints`; return the step's folder."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[tuple[str, str], torch.Tensor] = {}
    for name, tensor in build_model(job)[0].tensors().items():
        state[name, WEIGHT] = tensor.detach()
        if tensor.requires_grad:
            state[name, "exp_avg"] = torch.rand(tensor.shape, generator=generator)
            state[name, "step"] = torch.tensor(float(step))
    meeting, slots = threading.Barrier(RANKS), [None] * RANKS

    def run_rank(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            meeting.wait()
            found = list(slots)
            meeting.wait()
            return found

        pieces = [Piece(*key, tuple(t.shape), t, 0, (rank, RANKS)) for key, t in state.items()]
        save(run / "checkpoints", _snapshot(job, step, pieces), rank, gather)

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return folder_of(run / "checkpoints", step)


def _snapshot(job: Any, step: int, pieces: list[Piece]) -> Snapshot:
    values = {
        "samples": step * job.train.global_batch,
        "strategy": "ddp",
        "layout": {"pp": 1, "dp": RANKS, "replicate": RANKS, "shard": 1},
        "world_size": RANKS,
        "job": to_dict(job),
        "versions": {"hybrid": "0", "torch": torch.__version__},
        "rng": [],
        "loss_scale": None,
    }
    return Snapshot(step, shares_of(pieces), {}, {}, values)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest as somebody would who means it: its own hash is made anew."""
    values = json.loads((folder / MANIFEST).read_text())
    del values["sha256"]
    change(values)
    (folder / MANIFEST).write_text(seal(values))
