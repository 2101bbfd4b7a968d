"""What a job and a command say by themselves is refused before torch is imported, in one line.

Nothing is started: what starts processes is a stub. A host of two cores is played.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid.job.errors import JobError
from hybrid.launch import limits
from hybrid.models import outline
from hybrid.training.early import check_early
from tests.conftest import ROOT, small_job
from tests.early_cases import CASES

Ended = dict[str, tuple[str, str, str]]
TWO_CORES = "import hybrid.launch.limits as limits; limits.num_cores = lambda process=0: 2; "


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """How each command ended: all ran in one process, which never imported torch."""
    code = TWO_CORES + "from tests.early_cases import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path_factory.mktemp("early"),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found, loaded = json.loads(done.stdout)
    assert loaded == []
    return {command: tuple(how) for command, how in found.items()}


@pytest.mark.parametrize("command", CASES, ids=lambda command: command[:80])
def test_what_is_known_is_said_before_anything_starts(command: str, ended: Ended) -> None:
    words, (end, stdout, stderr) = CASES[command], ended[command]
    started = words[0] == "STARTED"
    assert (end, stdout) == ("STARTED" if started else "2", ""), stderr
    lines = stderr.splitlines()
    if started and words[1:]:
        (line,) = lines
        assert line.startswith("hybrid: warning: ")
    elif started:
        line = ""
        assert lines == []
    else:
        (line,) = lines
        assert line.startswith("hybrid: ") and "Traceback" not in stderr
    assert [word for word in words[started:] if word not in line] == [], line
    assert len(line) < 400


@pytest.mark.parametrize("nproc", [0, -1, True, 2.0, "4", 10**30, 65])
def test_python_callers_are_told_of_numbers_of_processes_too(
    nproc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "num_cores", lambda process=0: 1)
    with pytest.raises(JobError, match=r"--nproc: .*valid: 1 to 64"):
        check_early(small_job(), ["ddp"], nproc)
    assert check_early(small_job(), ["ddp"], 24) == 24


def test_the_launcher_itself_starts_no_more_than_the_host_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybrid.launch import local

    monkeypatch.setattr(local, "_start", lambda *_: pytest.fail("a rank was started"))
    with pytest.raises(JobError, match="processes, and this host has"):
        local.run_ranks(limits.most_processes() + 1, [], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_outline_has_the_defaults_of_the_families() -> None:
    from hybrid.data.random import random
    from hybrid.data.text import CONTEXT
    from hybrid.models.linear import linear
    from hybrid.models.mlp import mlp

    def default(function: Any, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    assert default(mlp, "sizes") == outline.MLP_SIZES
    assert default(linear, "in_features") == default(random, "features") == outline.FEATURES
    assert default(linear, "out_features") == default(random, "classes") == outline.CLASSES
    assert CONTEXT == outline.TEXT_CONTEXT


@pytest.mark.parametrize(
    "model, layers",
    [
        ({"name": "linear"}, 1),
        ({"name": "mlp"}, 3),
        ({"name": "mlp", "options": {"sizes": "all"}}, None),
        ({"name": "gpt", "options": {"preset": "1m"}}, 7),
        ({"name": "gpt", "options": {"preset": "1m", "num_layers": 2}}, 4),
        ({"name": "gpt", "options": {"preset": "none"}}, None),
        ({"name": "gpt", "options": {"preset": []}}, None),
        ({"name": "hf:nowhere"}, None),
        ({"name": "some.module:model"}, None),
    ],
)
def test_layers_are_counted_where_the_job_tells_them(
    model: dict[str, Any], layers: int | None
) -> None:
    assert outline.count_layers(small_job(model=model)) == layers
