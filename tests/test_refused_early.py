"""What the command line or a rank refuses ends in one line, where one can before torch is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid.cli.checkpoints import _check_given
from hybrid.job.errors import Failure, JobError, RunFailed
from hybrid.job.imports import find_function
from hybrid.job.outputs import as_word
from hybrid.launch.environment import without_launcher
from hybrid.launch.placement import find_placement
from hybrid.models.hf.folder import check_folder
from hybrid.training.branches import ends_command
from hybrid.training.resume import check_start
from tests.conftest import ROOT
from tests.refusals import lines_before_torch

JOB = str(ROOT / "launch" / "jobs" / "linear.toml")
# Words of a command, and what the line on them must say.
COMMANDS: list[tuple[list[str], str]] = [
    (["generate", "x", "--tokens=-0"], "'--tokens': '-0': valid: 1 or more"),
    (["generate", "x", "--top-k", "0"], "'--top-k': '0': valid: 1 or more"),
    (["generate", "x", "--temperature", "1,5"], "'--temperature': '1,5': valid: a number"),
    (["generate", "x", "--temperature", "nan"], "'--temperature': 'nan': valid: a number"),
    (["generate", "x", "--seed", "-1"], "'--seed': '-1': valid: 0 up to"),
    (["generate", JOB], "linear.toml: is no folder; valid: the folder of"),
    (["export", "/", "--to", "x", "--job", "nosuch"], "nosuch: cannot be read: No such file"),
    (["eval", "/", "--set", "="], "--set '=': write a.b=value"),
    (["eval", "/", "--job", JOB, "--set", "train.steps=x"], "train.steps = 'x'"),
    (["generate", "x", "--prompt", "\udcff"], "'--prompt': '\\udcff': is not UTF-8 text"),
    (["train", JOB, "--strategy", "single", "--resume", "n" * 300], "is no folder; valid: auto"),
    (["train", JOB, "--strategy", "single", "--resume", "/"], "holds no checkpoint; valid: auto"),
]


def test_commands_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    commands = [words for words, _ in COMMANDS]
    lines = lines_before_torch(commands, without_launcher(), tmp_path)
    assert len(lines) == len(COMMANDS), lines
    for line, (_, words) in zip(lines, COMMANDS, strict=True):
        assert line.startswith("hybrid: ") and words in line, line


def test_a_working_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    command = f'cd {tmp_path}; mkdir gone; cd gone; rmdir ../gone; exec "$@"'
    words = [sys.executable, "-m", "hybrid", "inspect", "/"]
    done = subprocess.run(["bash", "-c", command, "-", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "hybrid: the working folder is gone" in done.stderr


def test_a_run_goes_on_only_from_what_may_be_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no checkpoint"):
        check_start(None, tmp_path)
    for name in ("manifest.json", "record.json", "checkpoints", "step-00000001"):
        folder = tmp_path / f"of {name}"
        (folder / name).mkdir(parents=True)
        check_start(None, folder)
    check_start(None, "auto")


def test_a_dash_first_makes_no_option_of_a_path() -> None:
    assert as_word(Path("./-out/x")) == "./-out/x" and as_word(Path("out/-x")) == "out/-x"


@pytest.mark.parametrize(
    ("kind", "compared", "goes_on", "ends"),
    [
        ("job", False, False, True),
        ("job", False, True, True),
        ("unsupported", False, False, True),
        ("room", True, True, True),
        ("job", True, False, True),
        ("job", True, True, False),  # the comparison takes it for a failure of this run
        ("unsupported", True, False, False),
        ("error", False, False, False),
    ],
)
def test_which_failures_of_ranks_end_the_command(
    kind: Any, compared: bool, goes_on: bool, ends: bool
) -> None:
    failed = RunFailed(Failure(3, "it cannot be", "", kind))
    assert ends_command(failed, compared, goes_on) == ends


def test_a_rank_of_ours_heeds_no_count_that_a_scheduler_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "::1", "MASTER_PORT": "0"}
    for key, value in {**given, "SLURM_RESTART_COUNT": "x"}.items():
        monkeypatch.setenv(key, value)
    assert find_placement(started_by_hybrid=True).rank == 2
    with pytest.raises(JobError, match="SLURM_RESTART_COUNT = 'x'"):
        find_placement()


@pytest.mark.parametrize("code", ["async def f(): pass", "async def f():\n    yield 1"])
def test_a_coroutine_function_is_refused_before_it_is_called(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_async.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_async", raising=False)
    with pytest.raises(JobError, match="is a coroutine function; valid: one without"):
        find_function("model.name = 'mine_async:f'", "mine_async:f")


def test_a_type_of_models_that_there_is_not_needs_no_import_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    (tmp_path / "config.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "e"}}')
    with pytest.raises(ValueError, match="model_type = 'evil': transformers has no such model"):
        check_folder(tmp_path)
    for known in ("llama", "gpt-sw3", "gpt2"):
        (tmp_path / "config.json").write_text(f'{{"model_type": "{known}"}}')
        check_folder(tmp_path)
    assert "transformers" not in sys.modules


def test_a_rank_refuses_a_missing_checkpoint_where_it_can_say_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(JobError, match="gone: is no folder"):
        _check_given(gone, None, None)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    _check_given(gone, None, None)
    with pytest.raises(JobError, match="--set '2': write"):
        _check_given(gone, None, ["2"])  # what the command line alone shows is said at once
