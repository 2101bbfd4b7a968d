"""`hybrid init` writes files that run as they are; `hybrid --version`; what one may do next."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import hybrid
from hybrid.job.errors import JobError
from hybrid.job.starter import write_starter
from tests.conftest import ROOT, hybrid_command
from tests.test_imports import HEAVY, run_python


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "hybrid", *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_what_it_writes_runs_as_it_is(tmp_path: Path) -> None:
    begun = command(tmp_path, "init", "mine")
    assert begun.returncode == 0 and begun.stdout.split() == ["mine.toml", "mine.py"]
    assert "hybrid: next: `hybrid compare mine.toml --nproc 2`" in begun.stderr
    assert 30 < len((tmp_path / "mine.py").read_text().splitlines()) < 60
    few = ["--set", "train.steps=3", "--strategies", "ddp,fsdp,pipeline"]
    done = command(tmp_path, "compare", "mine.toml", "--nproc", "2", *few)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "compare" / "compare.json").read_text())
    assert {name: p["state"] for name, p in result["parity"].items()} == dict.fromkeys(
        ("single", "ddp", "fsdp", "pipeline"), "equal"
    )
    assert "hybrid: next: open out/compare/report.html" in done.stderr


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for taken in ("mine.toml", "mine.py"):
        (tmp_path / taken).write_text("kept")
        with pytest.raises(JobError, match=f"'mine': {taken} is there already; valid: a name"):
            write_starter("mine")
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(taken, "kept")]
        (tmp_path / taken).unlink()
    (tmp_path / "mine").mkdir()  # gives way to mine.py
    assert [p.name for p in write_starter("mine")] == ["mine.toml", "mine.py"]


@pytest.mark.parametrize(
    "name",
    [
        *("class", "True", "9lives", "a-b", "a.b", "a/b", "", "größe", "mine.toml", "../mine"),
        *("torch", "random", "hybrid", "typing", "__main__", "sys", "pytest", "local_package"),
    ],
)
def test_a_name_that_cannot_be_imported_as_this_module_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "local_package").mkdir()
    (tmp_path / "local_package" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(JobError) as raised:
        write_starter(name)
    said = str(raised.value)
    assert said.startswith(f"NAME = {name!r}: ") and "; valid: " in said and "\n" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["local_package"]


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = command(tmp_path, "init", "torch")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert done.stderr.startswith("hybrid: NAME = 'torch': ") and not list(tmp_path.iterdir())


def test_the_releases_are_printed_without_an_import() -> None:
    code = (
        "import sys; sys.argv = ['hybrid', '--version']; from hybrid.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "print(*sorted(sys.modules))"
    )
    line, modules = run_python(code).splitlines()
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "accelerate", "deepspeed"))
    assert line == f"hybrid {version('hybrid')} ({others})"
    assert not set(HEAVY) & set(modules.split())


def test_the_releases_cost_what_help_costs() -> None:
    def cpu_s(word: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = hybrid_command(word)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    version_s, help_s = (min(cpu_s(word) for _ in range(3)) for word in ("--version", "--help"))
    assert version_s < help_s + 0.1


def test_what_to_do_next_is_never_in_json(tmp_path: Path) -> None:
    words = ["train", "launch/jobs/linear.toml", "--strategy", "single", "--set", "train.epochs=1"]
    done = hybrid_command(*words, "--out", str(tmp_path), "--json")
    assert json.loads(done.stdout)["status"] == "ok" and "next:" not in done.stdout + done.stderr


def test_evaluate_is_what_an_own_loop_needs() -> None:
    from hybrid.models.mlp import mlp
    from tests.conftest import SMALL, small_job

    job = small_job()
    engine = hybrid.open_engine(job, "single", *mlp(**SMALL["model"]["options"]))
    test = hybrid.build_data(job)[1]
    result = hybrid.evaluate(engine, test, job)
    assert result.samples == len(test) == 37
    assert result == hybrid.evaluate(engine, test, job, job.train.micro_batches)
    other = hybrid.evaluate(engine, test, job, 5)
    assert other.correct == result.correct and other.loss == pytest.approx(result.loss)
    engine.close()
    hybrid.cleanup()
