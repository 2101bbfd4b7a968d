"""The known failures: for each the release, a small job that shows it, and where it must show."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from packaging.version import Version

GOOD = "0.19.8"  # of DeepSpeed: what this project is tried with
OWN = "benchmarks.gallery."  # strategies of one's own

JOB: dict[str, Any] = {
    "model": {"name": f"{OWN}workload:perceptron", "options": {"sizes": [32, 24, 16, 12, 10]}},
    "data": {"name": "random", "options": {"samples": 96, "test_samples": 32, "features": 32}},
    "optimizer": {"name": "sgd", "lr": 0.1},  # which shows wrong scales; adamw hides them
    "train": {"global_batch": 32, "micro_batches": 4, "steps": 4},
}


class Row(NamedTuple):
    """One failure.

    release: of DeepSpeed, `good` one that does not have it; None where another package has it, and
    then `planted` (benchmarks/gallery/planted.py) shows it, and `mended` does not. adapter: what of
    that file lets an old release run under this project. step, quantity:
    where a comparison must find it. cause: what its likely cause must name. report: where it is
    reported. changes: of `JOB`, "a.b" to a value."""

    name: str
    strategy: str
    report: str
    step: int | None
    quantity: str
    changes: Mapping[str, Any] = MappingProxyType({})
    release: str | None = None
    good: str | None = GOOD
    planted: str | None = None
    mended: str | None = None
    adapter: str | None = None
    subject: str = "DeepSpeed"
    cause: str | None = None

    @property
    def job(self) -> dict[str, Any]:
        """Return the job as a mapping."""
        found = copy.deepcopy(JOB)
        for key, value in self.changes.items():
            *parents, last = key.split(".")
            section = found
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        return found

    @property
    def unmended(self) -> bool:
        """Tell whether the releases after the bad one are thought to have the failure too."""
        return bool(self.release and self.good) and Version(self.good) <= Version(self.release)

    @property
    def shown_release(self) -> str:
        """Name what has the failure."""
        return f"{self.subject} {self.release}" if self.release else self.subject


ROWS = (
    Row(
        name="ZeRO-2 with accumulation loses gradients",
        strategy="zero2",
        report="deepspeedai/DeepSpeed#7718",
        step=0,
        quantity="grad_norm",
        changes={"strategy.zero2.reduce_once": False},
        release="0.18.2",
    ),
    Row(
        name="pipeline with accumulation adds up what it should average",
        strategy="pipeline",
        report="deepspeedai/DeepSpeed#7773",
        step=0,
        quantity="grad_norm",
        release="0.17.6",
        cause="4 times too large: not divided by the number of micro-batches",
    ),
    Row(
        name="pipeline with accumulation scales the first stage twice",
        strategy="pipeline",
        report="deepspeedai/DeepSpeed#8152",
        step=0,
        quantity="grad_norm",
        release="0.19.2",
    ),
    Row(
        name="ZeRO-1 in bf16 with accumulation in fp32",
        strategy="zero1",
        report="deepspeedai/DeepSpeed#7985",
        step=0,
        quantity="grad_norm",
        changes={"train.precision": "bf16"},
        release="0.18.9",
        adapter="bf16_without_overflow",
        cause="what all ranks share was not reduced over all of them",
    ),
    Row(
        name="bf16 without ZeRO never zeroes its gradients",
        strategy=f"{OWN}zero0_bf16",
        report="deepspeedai/DeepSpeed#7839",
        step=1,
        quantity="grad_norm",
        changes={
            "train.precision": "bf16",
            "train.micro_batches": 1,
            "model.options.rounded": True,
        },
        release="0.18.5",
    ),
    Row(
        name="clipping at 1.0 where the file has no gradient_clipping",
        strategy=f"{OWN}own_file",
        report="deepspeedai/DeepSpeed#8068",
        step=1,
        quantity="loss",
        changes={"train.micro_batches": 1, "model.options.loss_scale": 30.0, "optimizer.lr": 0.01},
        release="0.19.8",
        good="0.19.2",
    ),
    Row(
        name="pipeline in fp32 clips all stages by the first one's norm",
        strategy="pipeline",
        report="none found; docs/upstream.md",
        step=1,
        quantity="loss",
        changes={"train.clip_norm": 0.05},
        release="0.19.8",
        good="0.19.8",
        planted="deepspeed_clips_alone",
    ),
    Row(
        name="FSDP on a host without a GPU becomes DDP",
        strategy="fsdp",
        report="none found; docs/work-arounds.md",
        step=None,
        quantity="receipt",
        planted="fsdp_falls_back",
        subject="Accelerate",
        cause="not so: every parameter is a DTensor",
    ),
    Row(
        name="MKL's first vector call is wrong by 1e-4",
        strategy="ddp",
        report="pytorch/pytorch#188792",
        step=1,
        quantity="loss",
        changes={
            "train.micro_batches": 1,  # the first call is on half the batch
            "model.options.sizes": [32, 256, 256, 10],
            "optimizer.lr": 2.0,
        },
        planted="mkl_unmended",
        mended="mkl_mended",
        subject="MKL",
    ),
)
