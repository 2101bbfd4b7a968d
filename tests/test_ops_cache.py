"""A build of an op that was killed stops no later start, and a live one is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybrid.launch import ops_cache
from hybrid.launch.ops_cache import (
    VARIABLE,
    private_ops_folder,
    remove_private_locks,
    remove_stale_locks,
    set_ops_folder,
    socket,
)
from tests.conftest import JOBS, ROOT

OP = "deepspeed_shm_comm"  # the op that DeepSpeed would build at every start on a CPU

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="without /proc no lock can be told to be stale"
)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)


def plant(root: Path) -> Path:
    lock = root / OP / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


@contextmanager
def built_elsewhere(lock: Path) -> Iterator[None]:
    """While it lasts, another process holds the lock as torch's builder does."""
    code = (
        "import sys; from torch.utils.file_baton import FileBaton\n"
        f"assert FileBaton({str(lock)!r}).try_acquire(); print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def test_a_lock_without_an_owner_is_removed(capsys: pytest.CaptureFixture[str]) -> None:
    lock = plant(private_ops_folder())
    remove_stale_locks()
    assert not lock.exists()
    said = capsys.readouterr().err
    assert said == f"hybrid: removed {lock}: the build that left it is gone\n"
    remove_stale_locks()
    assert not capsys.readouterr().err


def test_the_lock_of_a_build_stays_until_the_build_is_killed() -> None:
    lock = private_ops_folder() / OP / "lock"
    lock.parent.mkdir(parents=True)
    with built_elsewhere(lock):
        assert lock.exists() and remove_private_locks() == []
    assert lock.exists()  # killed, as by a scheduler
    assert len(remove_private_locks()) == 1 and not lock.exists()


def test_in_a_user_s_own_folder_it_is_named_and_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    lock = plant(tmp_path / "own")
    remove_stale_locks()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"hybrid: warning: {lock}: ") and "remove it" in said
    assert lock.exists()
    set_ops_folder()
    assert os.environ[VARIABLE] == str(tmp_path / "own")


def test_each_release_and_host_has_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    set_ops_folder()
    first = os.environ.pop(VARIABLE)
    assert first == str(private_ops_folder())
    monkeypatch.setattr(ops_cache, "package_version", lambda name: "0.0.0")
    second = private_ops_folder()
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    assert len({first, str(second), str(private_ops_folder())}) == 3


@pytest.mark.slow
def test_a_killed_build_does_not_hang_the_next_start(tmp_path: Path) -> None:
    """In a user's own folder, where nothing may be removed: the op is not needed at all."""
    plant(tmp_path / "own")
    command = [sys.executable, "-m", "hybrid", "train", str(JOBS / "mlp.toml")]
    command += ["--strategy", "pipeline", "--nproc", "2", "--set", "train.epochs=1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        env=os.environ | {VARIABLE: str(tmp_path / "own"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=90,  # as it is, it takes 10; with the op it would wait for ever
    )
    assert done.returncode == 0, done.stderr
    assert "remove it" in done.stderr
    assert [path.name for path in (tmp_path / "own" / OP).iterdir()] == ["lock"]
