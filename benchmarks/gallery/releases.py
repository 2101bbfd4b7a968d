"""Installs a release of DeepSpeed in a folder of its own, beside the one that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import distributions, version
from pathlib import Path

PACKAGE = "deepspeed"
NEWEST = "newest"
INSTALL_S = 900  # a source build that takes longer is stuck


class InstallError(Exception):
    """Says why pip could not install a release."""


def install(release: str, cache: Path) -> Path | None:
    """Return a folder to put on PYTHONPATH that holds a release of DeepSpeed.

    release: such as "0.18.2", or "newest" for what pip takes by itself. The folder stays in `cache`
    for the next time. Returns None where the release is the installed one. Raises InstallError."""
    if release == version(PACKAGE):
        return None
    folder = cache / f"{PACKAGE}-{release}"
    if release != NEWEST and folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        _run_pip(release, Path(made))
        found = release_in(Path(made))
        folder = cache / f"{PACKAGE}-{found}"
        if not folder.is_dir():
            Path(made).chmod(0o755)
            Path(made).rename(folder)
            Path(made).mkdir()  # for the context to remove
    return folder


def release_in(folder: Path) -> str:
    """Return the release that a folder holds; raises InstallError where it holds none."""
    for found in distributions(name=PACKAGE, path=[str(folder)]):
        return found.version
    raise InstallError(f"pip left no {PACKAGE} in {folder}")


def _run_pip(release: str, folder: Path) -> None:
    """Install a release without what it depends on, which is installed already.

    DS_BUILD_OPS=0 leaves all ops to be compiled at first use, and none is used here."""
    wanted = PACKAGE if release == NEWEST else f"{PACKAGE}=={release}"
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), wanted],
        env=os.environ | {"DS_BUILD_OPS": "0"},
        capture_output=True,
        text=True,
        timeout=INSTALL_S,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word from pip"])[-1]
        raise InstallError(f"pip could not install {wanted}: {last}")
