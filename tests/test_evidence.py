"""The evidence of a self-test: the file, its check, and what hosts with GPUs would run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hybrid.doctor.evidence import Host, check_evidence, make_evidence, merge_hosts
from hybrid.doctor.finding import Finding, Link
from hybrid.doctor.self_test import Group, Tested, list_groups, tiny_job
from hybrid.job.errors import JobError
from hybrid.strategies.registry import NAMES
from tests.conftest import ROOT, hybrid_command
from tests.stub_cuda import StubCuda

FILES = sorted((ROOT / "benchmarks" / "clusters").glob("*.json"))

Tested.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture
def valid(tmp_path: Path) -> dict[str, Any]:
    """Evidence of four ranks on two hosts, as its file has it."""
    views = [("id/1", Host("node7", [0], ["A"], {})), ("id/2", Host("node77", [1], [], {}))]
    views += [("id/1", Host("node7", [2], ["A"], {})), ("id/2", Host("node77", [3], [], {}))]
    tested = [Tested(name, "equal", 4, "cpu", 1.0, None, 1e-9, 1e-9) for name in NAMES]
    link = Link((0, 1), ("node7", "node77"), 1e-4, 1e9)
    found = [Finding("network", "warning", "node77 is slow, node7 is not"), Finding("x", "ok", "")]
    made = make_evidence("srun", merge_hosts(views), tested, [link], found)
    from hybrid.records import write

    write(made, tmp_path / "e.json")
    data: dict[str, Any] = json.loads((tmp_path / "e.json").read_text())
    return data


def test_it_names_no_host(valid: dict[str, Any], tmp_path: Path) -> None:
    assert valid["findings"][0]["found"] == "host1 is slow, host0 is not" and valid["ok"]
    assert valid["links"][0]["hosts"] == ["host0", "host1"]
    assert [(h["ranks"], h["gpus"]) for h in valid["hosts"]] == [([0, 2], ["A", "A"]), ([1, 3], [])]
    assert check_evidence(tmp_path / "e.json").world_size == 4


WRONG: dict[str, Any] = {
    "schema": lambda e: e.update(schema="hybrid-evidence-0"),
    "colour = 'red': unknown": lambda e: e.update(colour="red"),
    "world_size = '4'": lambda e: e.update(world_size="4"),
    "hosts: their ranks": lambda e: e["hosts"].pop(),
    "lacks zero2": lambda e: e["tested"].pop(NAMES.index("zero2")),
    "has fsdp 2 times": lambda e: e["tested"].append(dict(e["tested"][NAMES.index("fsdp")])),
    ": contradicts fsdp": lambda e: e["tested"][3].update(status="failed", reason="it hung"),
    "ddp: failed without a reason": lambda e: e["tested"][1].update(status="failed"),
    "ddp: is equal without": lambda e: e["tested"][1].update(max_loss_diff=None),
    "tested.0.processes": lambda e: e["tested"][0].pop("processes"),
    "tested.0.speed": lambda e: e["tested"][0].update(speed=9),
    "links: ranks = [0, 4]": lambda e: e["links"][0].update(ranks=[0, 4]),
    "a rate above 0": lambda e: e["links"][0].update(bytes_per_s=0),
    "launcher": lambda e: e.pop("launcher"),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_file_is_refused_in_one_line(
    said: str, valid: dict[str, Any], tmp_path: Path
) -> None:
    WRONG[said](valid)
    (tmp_path / "e.json").write_text(json.dumps(valid))
    with pytest.raises(JobError) as raised:
        check_evidence(tmp_path / "e.json")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_the_command_says_what_a_file_shows(valid: dict[str, Any], tmp_path: Path) -> None:
    good, bad = tmp_path / "e.json", tmp_path / "bad.json"
    bad.write_text(random.choice(["", "[", "[]", "7", '{"ok": NaN}']))
    done = hybrid_command("doctor", "--check", str(good))
    assert done.returncode == 0 and done.stdout.endswith("valid; 4 ranks on 2 hosts: 9 equal\n")
    for path in (bad, tmp_path / "missing.json"):
        done = hybrid_command("doctor", "--check", str(path))
        assert done.returncode == 2 and not done.stdout, done.stdout
        assert done.stderr.startswith(f"hybrid: --check {path}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_that_came_are_valid(path: Path) -> None:
    check_evidence(path)


# What a self-test runs, against a stub of torch.cuda


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_the_self_test_fits_the_gpus_of_a_host(
    gpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cuda = StubCuda(monkeypatch, tmp_path / "nvidiactl")
    with cuda.sees([f"GPU-{n}" for n in range(gpus)]):
        found = [(group.nproc, group.device) for group in list_groups(NAMES)]
        alone = [group.names for group in list_groups(NAMES) if group.nproc == 1]
    two, four = {0: ("auto", "auto"), 1: ("cpu", "cpu"), 2: ("auto", "cpu"), 8: ("auto", "auto")}[
        gpus
    ]
    assert found[:2] == [(2, two), (4, four)]
    assert found[2:] == ([(1, "cuda")] if gpus == 1 else [])
    assert alone == [[n for n in NAMES if n not in ("pipeline", "2d")]] * (gpus == 1)
    job = tiny_job(Group(16, "cpu", ["pipeline"]))
    assert len(job.model.options["sizes"]) == 17 and job.launch.device == "cpu"
