"""Jobs of the try-out's tests: the plain one, and how what is brought gets into it."""

from __future__ import annotations

from typing import Any

import hybrid

SEVERAL = ("ddp", "local_sgd", "fsdp", "zero1", "zero2", "zero3", "pipeline", "2d")
HERE = "tests.bad_luggage:"


def make_job(**changes: Any) -> hybrid.Job:
    """The plain model on plain data: batches of 12 in 48 samples, 7 steps."""
    job = {
        "model": {"name": f"{HERE}model", "options": {"kind": "plain"}},
        "data": {"name": f"{HERE}data", "options": {"kind": "plain"}},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"global_batch": 12, "micro_batches": 2, "steps": 7},
    }
    return hybrid.load_job(job, {key.replace("__", "."): v for key, v in changes.items()})


def of_model(kind: str, **more: Any) -> dict[str, Any]:
    return {"model__options": {"kind": kind}, **more}


def of_loss(kind: str, last: int = 4, **more: Any) -> dict[str, Any]:
    return {"model": {"name": f"{HERE}lossy", "options": {"kind": kind, "last": last}}, **more}


def of_data(kind: str, **more: Any) -> dict[str, Any]:
    return {"data__options": {"kind": kind}, **more}
