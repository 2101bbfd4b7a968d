"""A model too large for one rank trains where it is sharded or cut, and fails clearly elsewhere.

The memory of each rank is limited by the kernel (`tests/limited.py`). What ranks hold without a
limit is held against theory below that.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid
from hybrid import records
from hybrid.job.file import to_dict
from hybrid.models import build_model
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

STATES = 16  # bytes a parameter in fp32 under AdamW: itself, its gradient, two moments
LIMITED = [sys.executable, str(ROOT / "tests" / "limited.py")]


def gpt_job(width: int, num_layers: int, steps: int) -> Any:
    """A GPT on batches of 4 x 8 tokens: its parameters outweigh its activations."""
    return hybrid.load_job(
        {
            "model": {
                "name": "gpt",
                "options": {
                    "num_layers": num_layers,
                    "width": width,
                    "num_heads": 8,
                    "context": 8,
                    "vocab_size": 64,
                },
            },
            "data": {
                "name": "tests.workloads:sentences",
                "options": {"size": 24, "tokens": 8, "vocab_size": 64},
            },
            # An eps far above the rounding of gradients, of which AdamW makes whole steps else:
            # a bias that starts at zero is nothing but its few steps.
            "optimizer": {"name": "adamw", "lr": 0.001, "eps": 1.0},
            "train": {"global_batch": 4, "steps": steps},
            "strategy": {
                "local_sgd": {"sync_every": 2},
                "pipeline": {"partition": "parameters"},
            },
        }
    )


def num_parameters(job: Any) -> int:
    """Of the whole model."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(job)[0].names())


def test_what_one_rank_cannot_hold_trains_where_it_is_sharded_or_cut(tmp_path: Path) -> None:
    job = gpt_job(width=256, num_layers=12, steps=3)
    parameters = num_parameters(job)
    limit = 15 * parameters
    assert limit < STATES * parameters  # of which fp32 and AdamW leave no choice

    result = hybrid.compare(
        job,
        ["ddp", "fsdp", "zero3", "pipeline"],
        nproc=4,
        out=tmp_path,
        program=[*LIMITED, str(limit), "single"],
    )
    for name in ("fsdp", "zero3", "pipeline"):
        record = result.strategies[name]
        assert record.status == "ok", record.reason
        assert len(record.steps) == 3 and result.parity[name].ok, result.parity[name]
    failed = result.strategies["ddp"]
    assert failed.status == "failed" and failed.reason
    for words in (
        r"^rank \d on \S+: out of memory in step 0; could not allocate \d+ bytes; ",
        rf"this rank holds all {parameters:,} parameters of the model: ",
        r"the state of adamw they take 16 bytes each in fp32, \d+ MiB, ",
        r"RLIMIT_DATA allows this process \d+ MiB in all; ",
        r"fsdp, zero3, pipeline and 2d least",
    ):
        assert re.search(words, failed.reason), (words, failed.reason)


def test_the_command_fails_with_the_message_first(tmp_path: Path) -> None:
    job = gpt_job(width=512, num_layers=12, steps=3)
    parameters = num_parameters(job)
    records.write(to_dict(job), tmp_path / "job.json")
    kib = STATES * parameters // 1024  # libraries alone are 300 MB of it
    limited = ["sh", "-c", f'ulimit -d {kib} && exec "$@"', "sh"]
    command = [sys.executable, "-m", "hybrid", "train", str(tmp_path / "job.json")]
    done = subprocess.run(
        [*limited, *command, "--strategy", "single", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hybrid: ")]
    assert re.match(r"hybrid: rank 0 on \S+: out of memory \w", lines[0]), done.stderr
    assert f"{parameters:,} parameters" in lines[0]
    left = records.read(records.Record, tmp_path / "run" / "record.json")
    assert left.status == "failed" and "out of memory" in str(left.reason)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    """Parameters of a small GPT, and its records on two processes."""
    job = gpt_job(width=192, num_layers=8, steps=3)
    out = tmp_path_factory.mktemp("memory")
    names = ["ddp", "local_sgd", "fsdp", "zero1", "zero3", "pipeline"]
    result = hybrid.compare(job, names, nproc=2, out=out)
    assert result.ok, [(n, r.reason, result.parity[n]) for n, r in result.strategies.items()]
    return num_parameters(job), result.strategies


@pytest.mark.parametrize(
    ("name", "states", "beside"),
    [
        # Bytes a parameter of the model; `beside`: measured, and a margin of 0.3 at most.
        ("single", 16, 0.3),
        # A merge takes place in the parameters; its drift takes a copy, when gradients are gone.
        ("local_sgd", 16, 0.3),
        # The activations of 16 tokens: 0.7.
        ("ddp", 16, 1),
        # A layer, an eighth of the model, as parameters in use, as gathered ahead, as a whole
        # gradient and as gloo's copy of that, before the shard's last gradients: 1.6.
        ("fsdp", 8, 1.9),
        # DeepSpeed steps on a copy of its shard's parameters, has the first rank's gradients twice,
        # and a bucket: 2 + 1.8 + 0.3.
        ("zero1", 12, 4.4),
        # Weights and gradients of a layer, and a bucket, not all weights and no copy: 2.5.
        ("zero3", 8, 2.8),
        # A bucket of gradients, and the larger stage: 0.4.
        ("pipeline", 8, 0.7),
    ],
)
def test_peaks_are_what_theory_says(
    name: str, states: int, beside: float, measured: tuple[int, dict[str, Any]]
) -> None:
    parameters, strategies = measured
    for peak in strategies[name].memory.step_peak_bytes:
        assert 0.99 * states <= peak / parameters <= states + beside, peak / parameters
