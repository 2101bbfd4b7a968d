"""A dry-run plays a rank: what it says is the closed form, and what a real run measures."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest

import hybrid
from benchmarks.dry_run import JOB, Sizes, differences
from hybrid import records
from hybrid.job.errors import JobError
from hybrid.training.dry_run import dry_run
from hybrid.training.run import run_job
from tests.conftest import hybrid_command

SIZES = Sizes(layers=5, width=42, vocab_size=101, replicate=3, shard=5)
OPTIONS = {"num_layers": 5, "width": 42, "num_heads": 3, "vocab_size": 101, "context": 17}
WORLD = SIZES.replicate * SIZES.shard


def gpt_job(folder: Path, **changes: Any) -> Any:
    """The benchmark's job with three heads, five layers, a vocabulary of 101 and odd sizes."""
    file = folder / "job.toml"
    file.write_text(JOB.format(world=WORLD, replicate=SIZES.replicate, shard=SIZES.shard))
    data = {"samples": 97, "context": 17, "vocab_size": 101}
    given = {"model.options": OPTIONS, "data.options": data} | changes
    return hybrid.load_job(file, given)


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and torch's stores over TCP cannot be made."""
    import torch.distributed as dist

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket is opened")

    for name in ("connect", "bind", "listen"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(dist, "TCPStore", refuse)
    monkeypatch.setattr(dist.distributed_c10d, "TCPStore", refuse, raising=False)


def test_shards_and_collectives_are_the_closed_form(tmp_path: Path, no_socket: None) -> None:
    """The first rank, the last one, whose shards are the smallest, and one between."""
    drawn = random.randrange(1, WORLD - 1)
    job = gpt_job(tmp_path)
    for rank in (0, WORLD - 1, drawn):
        found = dry_run(job, "fsdp", WORLD, rank)
        assert found.refused is None
        assert differences(records.to_dict(found), SIZES) == [], f"rank {rank}"
        wrong = SIZES._replace(shard=SIZES.replicate, replicate=SIZES.shard)
        assert len(differences(records.to_dict(found), wrong)) >= 2  # the form can be missed
    assert [file.name for file in tmp_path.iterdir()] == ["job.toml"]


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_real_run_of_four_ranks_measures_the_same(strategy: str, tmp_path: Path) -> None:
    changes = {"parallel.replicate": 2, "parallel.shard": 2, "train.steps": 6}
    job = gpt_job(tmp_path, **changes, **{"train.micro_batches": 2, "train.clip_norm": 0.5})
    rank = random.randrange(4)
    found = dry_run(job, strategy, 4, rank)
    record = run_job(job, strategy, tmp_path / "out", 4)
    assert record and record.comm and record.memory and found.memory_bytes
    played: dict[str, list[int]] = {}
    for one in found.collectives:
        sums = played.setdefault(one.op, [0, 0])
        sums[0], sums[1] = sums[0] + one.calls, sums[1] + one.bytes
    measured = {
        op: [by["calls"][rank], by["payload_bytes"][rank]] for op, by in record.comm.by_op.items()
    }
    assert played == measured, f"rank {rank}"
    peak = record.memory.step_peak_bytes[rank]
    assert found.memory_bytes == pytest.approx(peak, rel=0.02), f"rank {rank}"


def test_local_sgd_is_played_in_the_step_that_merges(tmp_path: Path) -> None:
    job = gpt_job(tmp_path, **{"strategy.local_sgd.sync_every": 7})
    found = dry_run(job, "local_sgd", 4, 3)
    merged = 4 * (found.parameters_total or 0) + 4 * 7 * 5  # and five blocks' rotary tables
    assert [one.bytes for one in found.collectives if one.op == "all_reduce"] == [merged]
    assert found.parameters_here == found.parameters_total


WRONG = {
    "world that does not multiply": ("fsdp", 14, 0, "parallel.replicate x parallel.shard"),
    "no world": ("fsdp", 0, 0, "--world 0: valid: 1 to 16384"),
    "world too large": ("ddp", 16385, 0, "--world 16385: valid: 1 to 16384"),
    "rank outside": ("fsdp", 15, 15, "--rank 15: no rank of --world 15; valid: 0 to 14"),
    "negative rank": ("fsdp", 15, -1, "--rank -1"),
    "unknown strategy": ("hsdp", 15, 0, "strategy = 'hsdp': unknown; valid: single, ddp"),
    "single on two": ("single", 2, 0, "--world 2: single runs on 1 process; valid: 1"),
    "a batch too small": ("ddp", 64, 0, "train.global_batch = 15"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numbers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    strategy, world, rank, words = WRONG[case]
    with pytest.raises(JobError) as raised:
        dry_run(gpt_job(tmp_path), strategy, world, rank)
    assert words in str(raised.value) and "\n" not in str(raised.value)


UNPLAYED: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "zero3": ("zero3", 4, {}, "ZeRO"),
    "pipeline": ("pipeline", 4, {}, "shapes of activations"),
    "2d": ("2d", 4, {}, "shapes of activations"),
    "fp16": ("ddp", 4, {"train.precision": "fp16"}, "the loss scale is read"),
    "batch norm": (
        "fsdp",
        3,
        {
            "model": {"name": "tests.bad_luggage:normed"},
            "data": {"name": "random", "options": {"samples": 90, "features": 16, "classes": 4}},
            "parallel": {},
            "train.global_batch": 18,
        },
        "batch norm moves buffers",
    ),
    "an empty micro-batch": ("ddp", 15, {"train.micro_batches": 2}, "has no sample"),
    "too many stages": ("pipeline", 15, {}, "7 layers"),
}


@pytest.mark.parametrize("case", UNPLAYED)
def test_what_cannot_be_played_is_named(case: str, tmp_path: Path) -> None:
    strategy, world, changes, words = UNPLAYED[case]
    found = dry_run(gpt_job(tmp_path, **changes), strategy, world)
    assert found.refused is not None and words in found.refused
    assert found.memory_bytes is None and not found.collectives and not found.shards


def test_the_command_prints_the_promised_keys_alone(tmp_path: Path) -> None:
    gpt_job(tmp_path)
    options = ", ".join(f"{k} = {json.dumps(v)}" for k, v in OPTIONS.items())
    sets = [f"model.options={{ {options} }}"]
    sets += ["data.options={ samples = 97, context = 17, vocab_size = 101 }"]
    words = [str(tmp_path / "job.toml"), "--strategy", "fsdp", "--rank", "7", "--json"]
    words += [word for one in sets for word in ("--set", one)]
    done = hybrid_command("dry-run", *words, "--world", str(WORLD))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    keys = "world rank layout parameters_total parameters_here collectives memory_bytes refused"
    assert set(keys.split()) <= found.keys()
    assert found["rank"] == 7 and found["layout"]["shard"] == 5
    assert {"op", "group_size", "calls", "bytes"} <= found["collectives"][0].keys()
    assert differences(found, SIZES) == []
