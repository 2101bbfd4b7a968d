"""A job that `single` and `ddp` cannot hold is compared all the same: by `--reference`, by a proxy.

Each rank limits its own memory when it builds the model (`tests/limited.py` says how), so that the
commands are those that anyone types.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import hybrid
from hybrid import records
from hybrid.job.file import to_dict
from hybrid.models.gpt import gpt
from hybrid.records import Comparison
from hybrid.report.standing import AT_PROXY
from tests import limited
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

OPTIONS = {"num_layers": 9, "width": 294, "num_heads": 3, "context": 7, "vocab_size": 61}
BYTES = 13  # a parameter that a rank may hold: fp32 and AdamW take 16 of a whole model
LIMITED = r"out of memory .*RLIMIT_DATA allows this process \d+ MiB in all"
# All strategies, of which these four are enough here.
FOUR = """
from hybrid.strategies import registry
registry.NAMES = ("single", "ddp", "fsdp", "pipeline")
from hybrid.cli import main
main()
"""
_limited: list[int] = []


def model(allowed: int, **options: Any) -> Any:
    """A GPT. A rank that builds it may take `allowed` bytes more than it has."""
    if "RANK" in os.environ and not _limited:
        limited.shrink_stacks()
        limited.return_freed_memory()
        limited.limit_memory(allowed)
        _limited.append(allowed)
    return gpt(**options)


def job_of(**changes: Any) -> Any:
    """Two steps of batches of five on four ranks; a parameter takes 16 bytes in all."""
    with torch.device("meta"):
        layers, _ = gpt(**OPTIONS)
    num_parameters = sum(p.numel() for p in layers.names())
    return hybrid.load_job(
        {
            "model": {
                "name": "tests.test_too_large:model",
                "options": {**OPTIONS, "allowed": BYTES * num_parameters},
            },
            "data": {
                "name": "tests.workloads:sentences",
                "options": {"size": 23, "tokens": 7, "vocab_size": 61},
            },
            # An eps far above the rounding of gradients, of which AdamW makes whole steps else.
            "optimizer": {"name": "adamw", "lr": 0.001, "eps": 1.0},
            "train": {"global_batch": 5, "steps": 2},
            "launch": {"collective_timeout_s": 60},
            "strategy": {"pipeline": {"partition": "parameters"}},
            **changes,
        }
    )


class Ended(NamedTuple):
    """What a comparison left."""

    result: Any
    files: dict[str, str]


def texts_in(out: Path) -> dict[str, str]:
    """What a reader sees."""
    return {name: (out / name).read_text() for name in ("compare.md", "report.html")}


@pytest.fixture(scope="module")
def by_reference(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """`hybrid compare JOB --reference fsdp`, where four strategies are all that there are."""
    out = tmp_path_factory.mktemp("reference")
    records.write(to_dict(job_of()), out / "job.json")
    words = ["compare", str(out / "job.json"), "--nproc", "4", "--reference", "fsdp"]
    done = subprocess.run(
        [sys.executable, "-c", FOUR, *words, "--out", str(out / "run"), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return Ended(json.loads(done.stdout), texts_in(out / "run"))


def test_another_reference_takes_the_place_of_what_is_too_large(by_reference: Ended) -> None:
    result, runs = by_reference.result, by_reference.result["strategies"]
    assert result["ok"] and result["reference"] == "fsdp"
    assert {name: run["status"] for name, run in runs.items()} == {
        "fsdp": "ok",
        "single": "not_possible",
        "ddp": "not_possible",
        "pipeline": "ok",
    }
    for name in ("single", "ddp"):
        assert re.match(rf"rank \d on \S+: {LIMITED}", runs[name]["reason"]), runs[name]["reason"]
    assert set(result["parity"]) == {"fsdp", "pipeline"}
    pipeline = result["parity"]["pipeline"]
    assert (pipeline["state"], pipeline["reference"]) == ("equal", "fsdp")
    for text in by_reference.files.values():
        assert "pipeline computed what fsdp did" in text and "2 not possible here" in text
    table = by_reference.files["compare.md"]
    assert re.search(r"^\| fsdp \| reference \| [\d.]+ \| 1.00x \| [\d.]+ MiB ", table, re.M)
    assert re.search(r"^\| pipeline \| equal \| [\d.]+ \| [\d.]+x \| [\d.]+ MiB ", table, re.M)
    assert re.search(r"^\| single \| not possible \| — \| — \| — ", table, re.M), table


def test_a_proxy_proves_what_single_cannot_hold(tmp_path: Path) -> None:
    """Here `single` is asked for by name beside the proxy, which stands in for it."""
    small = {"model": {"options": {"num_layers": 5, "width": 18}}}
    job = job_of(proxy=small)
    result = hybrid.compare(job, ["single", "pipeline"], nproc=4, out=tmp_path)
    assert result.ok and result.reference == "proxy"
    single = result.strategies["single"]
    assert single.status == "not_possible" and re.search(LIMITED, str(single.reason))
    states = {name: (p.state, p.reference) for name, p in result.parity.items()}
    assert states == {"pipeline": ("equal", "proxy")}
    proved = records.read(Comparison, tmp_path / "proxy" / "compare.json")
    assert proved.ok and proved.reference == "single" and len(proved.strategies) == 2
    files = texts_in(tmp_path)
    for text in files.values():
        assert f"ipeline {AT_PROXY}, 1 not possible here" in text
    row = rf"^\| pipeline \| {AT_PROXY} \| [\d.]+ \| — \| [\d.]+ MiB "
    assert re.search(row, files["compare.md"], re.M), files["compare.md"]
