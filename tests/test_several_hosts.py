"""Runs over several hosts (network namespaces of this machine): equal, and ended by a cut link."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

import hybrid
from benchmarks.hosts import SSH_TOOLS, Hosts, why_not
from hybrid import records
from hybrid.job.file import to_dict
from hybrid.records import Record
from tests.conftest import JOBS, small_job
from tests.pages import blocks, environment, record_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
TIMEOUT_S = 6
OVER_SSH = [command for block in blocks() if block.how == "over ssh" for command in block.commands]
NEEDED = {"deepspeed_hosts.sh": "pdsh", "openmpi.sh": "mpirun.openmpi", "mpich.sh": "mpirun.mpich"}


def start(hosts: Hosts, strategy: str, out: Path) -> list[subprocess.Popen[bytes]]:
    """Two ranks of `out/asked.json`, a host each."""
    words = ["train", str(out / "asked.json"), "--strategy", strategy, "--out", str(out)]
    return hosts.start_ranks([0, 1], words, out)


@pytest.mark.parametrize("strategy", ["ddp", "pipeline"])
def test_two_hosts_compute_what_one_process_does(strategy: str, tmp_path: Path) -> None:
    job = small_job()
    records.write(to_dict(job), tmp_path / "asked.json")
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
    records.write(to_dict(small_job(train__steps=10**6, launch=limits)), tmp_path / "asked.json")
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


@pytest.mark.parametrize("command", OVER_SSH)
def test_a_page_s_command_starts_the_other_host_over_ssh(command: str, tmp_path: Path) -> None:
    """launch/hostfile names two hosts of two ranks."""
    needed = NEEDED[command.rpartition("/")[2]]
    if reason := why_not(*SSH_TOOLS, needed):
        pytest.skip(reason)
    environ = environment(tmp_path) | {"STRATEGY": "fsdp"}
    if needed.startswith("mpirun"):
        environ["MPIRUN"] = needed
    with Hosts(2) as hosts:
        words = ["bash", "-c", f"cd {tmp_path} && {command} --set train.epochs=1"]
        run = hosts.start(0, words, environ | hosts.start_ssh(), log := tmp_path / "output.txt")
        assert run.wait(timeout=120) == 0, log.read_text()
        assert min(hosts.sent(host) for host in (0, 1)) > 10_000_000  # 535,818 parameters, sharded
    record = record_of(tmp_path)
    assert (record["status"], record["world_size"], len(record["steps"])) == ("ok", 4, 10)
    single = hybrid.train(hybrid.load_job(JOBS / "mlp.toml", {"train.epochs": 1}), "single")
    for step, expected in zip(record["steps"], single.steps, strict=True):
        assert step["loss"] == pytest.approx(expected.loss, rel=1e-6)
