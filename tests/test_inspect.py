"""`hybrid inspect`: what it says of a checkpoint, and of what is none."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid import cli
from hybrid.checkpoint.manifest import MANIFEST
from tests.conftest import ROOT, small_job
from tests.saved import save_checkpoint

KEYS = ["step", "strategy", "layout", "state_hash", "tensors", "bytes", "verified", "problems"]
NAMES = ["0.weight", "0.bias"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two checkpoints, by four ranks."""
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run, small_job(), 3)
    save_checkpoint(run, small_job(), 6)
    return run


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the newest, to damage."""
    return Path(
        shutil.copytree(saved / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    )


def hybrid(*words: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process; its exit status."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_stdout", sys.stdout)
    monkeypatch.setattr(cli, "_keep_stdout", lambda: None)
    monkeypatch.setattr(sys, "argv", ["hybrid", *words])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    signal.signal(signal.SIGTERM, handler)
    return int(leave.value.code or 0)


def test_it_says_what_a_checkpoint_is(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = saved / "checkpoints" / "step-00000006"
    manifest = json.loads((step / MANIFEST).read_text())
    assert hybrid("inspect", str(saved), "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == KEYS
    assert (found["step"], found["strategy"], found["verified"]) == (6, "ddp", True)
    assert found["layout"] == manifest["layout"] and found["problems"] == []
    assert found["state_hash"] == manifest["state_hash"]
    assert found["tensors"] == sum(len(keys) for keys in manifest["tensors"].values()) > 8
    assert found["bytes"] == sum(f.stat().st_size for f in step.glob("*.safetensors"))
    assert hybrid("inspect", str(saved / "checkpoints"), monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert manifest["state_hash"] in text and "step-00000006" in text and "processes   4" in text


def test_no_checkpoint_is_a_mistake(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path, tmp_path / "gone", saved / "checkpoints" / "step-00000006" / MANIFEST):
        assert hybrid("inspect", str(path), "--json", monkeypatch=monkeypatch) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1 and str(path) in err


def test_a_manifest_that_cannot_be_read_leaves_nulls(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / MANIFEST).unlink()
    copy = Path(shutil.copytree(folder, folder.with_name("renamed")))
    for path in (folder, copy):
        assert hybrid("inspect", str(path), "--json", monkeypatch=monkeypatch) == 1
        found = json.loads(capsys.readouterr().out)
        assert [found[key] for key in KEYS[:-2]] == [None] * 6 and found["verified"] is False
        assert found["problems"][0].startswith(MANIFEST)


def test_the_hash_in_ten_lines_that_import_nothing_of_ours(saved: Path) -> None:
    """The script on the page prints the hash in the manifest."""
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    (script,) = [part for part in page.split("```python\n")[1:] if "hashlib" in part]
    script = script.partition("```")[0]
    assert "hybrid" not in script and len(script.splitlines()) <= 18
    folder = saved / "checkpoints" / "step-00000003"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == json.loads((folder / MANIFEST).read_text())["state_hash"]
