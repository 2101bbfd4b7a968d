"""`hybrid doctor` as a command, its self-test and links; exit 3 where something is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hybrid.doctor import Finding
from hybrid.doctor import troubles_elsewhere as elsewhere
from hybrid.records import Comparison, Difference, Parity, Record
from tests.conftest import ROOT

PROGRAMS = ("torchrun", "accelerate", "deepspeed", "mpirun", "srun", "pdsh", "ssh", "numactl")


def doctor(
    *words: str, launcher: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    command = [*(launcher or (sys.executable,)), "-m", "hybrid", "doctor", *words]
    ours = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        env={**os.environ, "PATH": ours, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


def by_name(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    report = json.loads(done.stdout)
    names = [f["name"] for f in report["findings"]]
    assert len(names) == len(set(names))
    return {f["name"]: f for f in report["findings"]}


def test_a_whole_machine() -> None:
    done = doctor("--json", "--no-self-test", GLOO_SOCKET_IFNAME="lo")
    found = by_name(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {tuple(f) for f in found.values()} == {("name", "status", "found", "mend")}
    assert found["torch"]["found"] == metadata.version("torch")
    assert "gloo" in found["backends"]["found"] and found["GLOO_SOCKET_IFNAME"]["found"] == "lo"
    assert set(PROGRAMS) == {n.split()[1] for n in found if n.startswith("launcher ")}
    assert found["launcher torchrun"]["status"] == "ok"


def test_an_error_is_exit_3_and_has_its_mend_in_the_text() -> None:
    done = doctor("--no-self-test", GLOO_SOCKET_IFNAME="nosuch0")
    assert done.returncode == 3, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("error    GLOO_SOCKET_IFNAME"))
    assert "'nosuch0': no such interface" in lines[at]
    assert lines[at + 1].strip().startswith("-> one of: lo")
    assert lines[-1] == "something that is needed is missing: see each error"


@pytest.mark.parametrize("self_test", ["--self-test", "--no-self-test"])
def test_a_broken_torch_is_a_finding(tmp_path: Path, self_test: str) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libgomp.so.1: cannot open')\n")
    done = doctor("--json", self_test, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    found = by_name(done)
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert found["devices"]["status"] == "error" and "libgomp" in found["devices"]["found"]
    if self_test == "--self-test":
        assert found["self-test"]["status"] == "warning"


def test_looking_costs_no_torch() -> None:
    code = "import sys, hybrid.doctor as d; list(d.check_packages()); list(d.check_machine())"
    subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True, cwd=ROOT
    )


def test_pairs_of_ranks_and_slow_links() -> None:
    from hybrid.doctor.links import Link, check_links, pairs

    assert pairs(["a", "a", "a", "b", "b", "c"]) == [(0, 1), (3, 4), (0, 3), (0, 5), (3, 5)]
    many = pairs([f"h{i}" for i in range(8)])
    assert many == [(i, (i + 1) % 8) for i in range(8)]
    rates = {("a", "a"): 5e6, ("a", "b"): 1.2e8, ("a", "c"): 1.2e8, ("b", "c"): 1.2e7}
    found = list(check_links([Link((0, 1), hosts, 1e-4, r) for hosts, r in rates.items()]))
    assert [f.status for f in found] == ["ok", "ok", "ok", "warning"]
    assert found[0].found == "both on a: 0.1 ms, 40 Mbit/s"
    assert found[1].found == "on a and b: 0.1 ms, 960 Mbit/s"


def test_troubles_of_other_hosts() -> None:
    fine, bad = Finding("torch", "ok", "2.13.0"), Finding("open files", "warning", "few", "ulimit")
    other = Finding("torch", "ok", "2.12.0")
    of_ranks = [("a", 0, [fine]), ("a", 1, [fine, bad]), ("b", 0, [other, bad]), ("b", 1, [bad])]
    version, limit = elsewhere(of_ranks)
    assert version.status == "warning" and version.found == "on b: 2.12.0, on a: 2.13.0"
    assert limit == Finding("open files", "warning", "on b: few", "ulimit")


def comparison(record: Record, parity: Parity | None) -> Comparison:
    records = {"single": Record("single", "ok"), "ddp": record}
    return Comparison({}, {}, "single", records, {"ddp": parity} if parity else {}, False)


def test_what_did_not_run_is_a_finding_with_the_reason() -> None:
    from hybrid.doctor.self_test import describe_run

    equal, unequal = (Parity(ok, 0.0, 0.0, {}, Difference(1, "loss", 1, 2)) for ok in (True, False))
    ran = Record("ddp", "ok", world_size=2)
    assert (
        describe_run("ddp", comparison(ran, equal), 7.0).found
        == "in 7 s, on 2 processes, as single does"
    )
    failed = describe_run("ddp", comparison(Record("ddp", "failed", "rank 1: no space"), None), 1.0)
    assert failed.status == "error" and "rank 1: no space" in failed.found
    differs = describe_run("ddp", comparison(ran, unequal), 1.0)
    assert differs.status == "error" and "loss" in differs.found
    impossible = describe_run(
        "ddp", comparison(Record("ddp", "not_possible", "no units"), None), 0.0
    )
    assert impossible.status == "warning" and "no units" in impossible.found


@pytest.mark.slow
def test_self_test_finds_a_strategy_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.doctor import self_test
    from hybrid.doctor.self_test import check_strategies

    monkeypatch.setattr(self_test, "STRATEGY_S", 0.01)
    (found,) = check_strategies(["single"])
    assert found.status == "error" and "had not ended after" in found.found


@pytest.mark.slow
def test_self_test_runs_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    from hybrid.doctor.self_test import check_strategies, num_processes

    (found,) = check_strategies(["pipeline"])
    assert found.status == "ok" and "on 2 processes" in found.found, found
    assert "warning" not in capsys.readouterr().err
    assert num_processes("2d") == 4


@pytest.mark.slow
def test_links_are_measured_under_a_launcher() -> None:
    torchrun = ("torchrun", "--nproc-per-node", "2")
    done = doctor("--json", launcher=torchrun)
    found = by_name(done)
    assert done.returncode == 0, done.stderr
    (link,) = json.loads(done.stdout)["links"]
    assert link["ranks"] == [0, 1] and 0 < link["latency_s"] < 0.1 and link["bytes_per_s"] > 1e6
    assert found["link 0-1"]["status"] == found["all-reduce"]["status"] == "ok"
    assert found["threads"]["found"].startswith("2 ranks of 1 threads")
