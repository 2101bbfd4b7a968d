"""Runs over several hosts (network namespaces of this machine): equal, and ended by a cut link."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import hybrid
from benchmarks.hosts import Hosts, why_not
from hybrid import records
from hybrid.job_file import to_dict
from hybrid.records import Record
from tests.conftest import small_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
TIMEOUT_S = 6


def start(hosts: Hosts, strategy: str, out: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks of `out/job.json`, a host each."""
    words = ["train", str(out / "job.json"), "--strategy", strategy, "--out", str(out)]
    return hosts.start_ranks([0, 1], words, out)


@pytest.mark.parametrize("strategy", ["ddp", "pipeline"])
def test_two_hosts_compute_what_one_process_does(strategy: str, tmp_path: Path) -> None:
    job = small_job()
    records.write(to_dict(job), tmp_path / "job.json")
    with Hosts(2) as hosts:
        ranks = start(hosts, strategy, tmp_path)
        codes = [rank.wait(timeout=120) for rank in ranks]
        assert codes == [0, 0], (tmp_path / "rank0.log").read_text()
        assert min(hosts.sent(host) for host in (0, 1)) > 10_000  # it went over the links
    run = records.read(Record, tmp_path / "record.json")
    single = hybrid.train(job, "single")
    for step, expected in zip(run.steps, single.steps, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-6)


def test_a_cut_link_ends_the_ranks_on_both_sides(tmp_path: Path) -> None:
    limits = {"start_timeout_s": 60, "collective_timeout_s": TIMEOUT_S}
    records.write(to_dict(small_job(train__steps=10**6, launch=limits)), tmp_path / "job.json")
    with Hosts(2) as hosts:
        ranks = start(hosts, "ddp", tmp_path)
        steps, deadline = tmp_path / "steps.jsonl", time.monotonic() + 60
        while not (steps.exists() and steps.read_text().count("\n") > 3):
            assert time.monotonic() < deadline, (tmp_path / "rank0.log").read_text()
            time.sleep(0.1)
        hosts.cut(1)
        cut = time.monotonic()
        codes = [rank.wait(timeout=120) for rank in ranks]
        assert time.monotonic() - cut < 2 * TIMEOUT_S + 12 and codes == [1, 1]
        names = [hosts.name(host) for host in (0, 1)]
    first = (tmp_path / "rank0.log").read_text()
    assert f"rank 0 on {names[0]} ends, because of rank 1 on {names[1]}: no sign of life" in first
    second = (tmp_path / "rank1.log").read_text()
    assert f"rank 1 on {names[1]} ends, because of rank 0 on " in second
    assert "meeting point" in second
