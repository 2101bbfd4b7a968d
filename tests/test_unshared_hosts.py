"""Two hosts of two ranks that share no file system: what works, and what is refused in one line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid import records
from hybrid.job.file import to_dict
from hybrid.launch.local import run_ranks
from hybrid.records import Record
from tests.conftest import small_job
from tests.played_host import SECOND, can_go_apart

pytestmark = pytest.mark.skipif(not can_go_apart(), reason="namespaces are not allowed here")
RANKS = 4
MODULES = ["hybrid.cli", "hybrid.training.loop", "accelerate"]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one rank ended: its status, what it printed, which files of the runs its host has."""

    status: str
    said: list[str]
    files: list[str]


def run(folder: Path, words: Sequence[str], job: Any, other: Any = None) -> list[Ended]:
    """Run `hybrid train` as four ranks of a launcher on two hosts, which have an `out` each."""
    codes, out = folder / "codes", folder / "out"
    for path in (codes, out):
        path.mkdir(exist_ok=True)
    for host, one in (("1", job), ("2", other or job)):
        records.write(to_dict(one), codes / f"job{host}.json")
    given = [str(out), str(codes), "train", "{job}", "--strategy", "ddp", *words]
    program = (sys.executable, "-m", "tests.played_host")
    run_ranks(RANKS, given, folder / "ranks", program=program, modules=MODULES)
    ended = []
    for rank in range(RANKS):
        status, *files = (codes / f"rank{rank}").read_text().splitlines()
        said = (folder / "ranks" / "logs" / f"rank{rank}.log").read_text().splitlines()
        ended.append(Ended(status, [line for line in said if line.startswith("hybrid: ")], files))
    return ended


def refusals(ended: Sequence[Ended]) -> list[str]:
    """What each rank said of a refusal: the first of each host says it, in one line."""
    assert [one.status for one in ended] == ["2"] * RANKS, ended
    lines = [[x for x in one.said if "valid:" in x] for one in ended]
    assert [len(one) for one in lines] == [1, 0, 1, 0], lines
    assert lines[0] == lines[2]
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    folder = tmp_path_factory.mktemp("hosts")
    return folder, run(folder, ["--out", str(folder / "out" / "run")], small_job(train__steps=3))


def test_hosts_without_a_common_file_system_train(trained: tuple[Path, list[Ended]]) -> None:
    folder, ended = trained
    assert [one.status for one in ended] == ["0"] * RANKS, ended
    record = records.read(Record, folder / "out" / "run" / "record.json")
    single = hybrid.train(small_job(train__steps=3), "single")
    assert record.world_size == RANKS
    for step, expected in zip(record.steps, single.steps, strict=True):
        assert step.loss == pytest.approx(expected.loss, rel=1e-6)


def test_what_rank_0_writes_is_on_its_host_alone(trained: tuple[Path, list[Ended]]) -> None:
    _, ended = trained
    assert "run/record.json" in ended[0].files
    assert {Path(file).parent.name for file in ended[2].files} == {"logs"}
    assert {Path(file).name[:5] for file in ended[2].files} == {"rank2"}


def test_a_state_that_not_all_hosts_could_save_is_refused_before_the_first_step(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out" / "run"
    (line,) = refusals(run(tmp_path, ["--out", str(out)], small_job(checkpoint__every=2)))
    assert line.startswith(f"hybrid: checkpoint.every = 2: rank 2 on {SECOND} does not see {out}")
    assert not (out / "record.json").exists() and not list(out.glob(".shared*"))


def test_a_checkpoint_that_a_host_does_not_have_is_refused(tmp_path: Path) -> None:
    saved, job = tmp_path / "out" / "saved", small_job(train__steps=2, checkpoint__every=2)
    hybrid.train(job, "single", saved)
    step = saved / "checkpoints" / "step-00000002"
    words = ["--out", str(tmp_path / "out" / "run"), "--resume", str(step)]
    (line,) = refusals(run(tmp_path, words, small_job(train__steps=4)))
    assert line.startswith(f"hybrid: --resume {step}: rank 2 on {SECOND} does not see rank00000")


def test_a_host_with_another_job_is_named(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path / "out" / "run")]
    (line,) = refusals(run(tmp_path, words, small_job(), small_job(optimizer__lr=0.3)))
    assert line.startswith(f"hybrid: optimizer.lr = 0.3: in the job of rank 2 on {SECOND}; rank 0")
    assert not (tmp_path / "out" / "run" / "record.json").exists()
