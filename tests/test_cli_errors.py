"""A wrong job or command line ends with 2 and one line that says what, and what would be right.

Most commands run in this process; those that matter for the streams run as a user types them.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybrid import cli
from hybrid.cli import main
from tests.conftest import JOBS, hybrid_command

LINEAR = str(JOBS / "linear.toml")
MLP = str(JOBS / "mlp.toml")
Run = Callable[..., tuple[int, str, str]]

# Files that the cases below name, in the folder where the command is typed.
FILES = {
    "bad.toml": "[train\nsteps = 3",
    "flat.toml": "train = 3",
    "list.json": "[1, 2]",
    "latin.toml": "caf\xe9 = 1",
    "owned.json": json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8}),
    "stage3.json": json.dumps({"zero_optimization": {"stage": 3}}),
    "not.json": "{",
    "word.json": '"zero"',
    "number.json": json.dumps({"zero_optimization": 3}),
}
# name: (what follows `hybrid`, words of the line); `@NAME` is short for `--strategy NAME`.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "no such job": (["train", "nowhere.toml", "@ddp"], ["nowhere.toml", "cannot be read"]),
    "a folder": (["train", ".", "@ddp"], ["cannot be read", "directory"]),
    "not TOML": (["train", "bad.toml", "@ddp"], ["bad.toml", "not a TOML file", "line 1"]),
    "not UTF-8": (["train", "latin.toml", "@ddp"], ["latin.toml", "UTF-8", "byte 3"]),
    "not sections": (["train", "list.json", "@ddp"], ["list.json", "list"]),
    "a value for a section": (["train", LINEAR, "@ddp", "--set", "train=3"], ["train = 3"]),
    "a key in a value": (
        ["train", "flat.toml", "@ddp", "--set", "train.steps=3"],
        ["train.steps", "not a section"],
    ),
    "unknown key": (
        ["train", LINEAR, "@ddp", "--set", "train.stpes=3"],
        ["train.stpes", "did you mean 'steps'?", "global_batch"],
    ),
    "not a pair": (["train", LINEAR, "@ddp", "--set", "steps"], ["'steps'", "a.b=value"]),
    "wrong value": (
        ["train", LINEAR, "@ddp", "--set", "optimizer.lr=0"],
        ["optimizer.lr", "greater than 0"],
    ),
    "unknown strategy": (["train", LINEAR, "@dpd"], ["'dpd'", "single, ddp", "pipeline, 2d"]),
    "unknown strategy to compare": (
        ["compare", LINEAR, "--strategies", "ddp,zero4"],
        ["'zero4'", "single, ddp", "pipeline, 2d"],
    ),
    "unknown model": (
        ["train", LINEAR, "@ddp", "--set", "model.name=lenear"],
        ["model.name = 'lenear'", "linear, mlp", "package.module:function"],
    ),
    "unknown data": (
        ["train", LINEAR, "@ddp", "--set", "data.name=mist"],
        ["data.name = 'mist'", "random, mnist"],
    ),
    "unknown module": (
        ["train", LINEAR, "@ddp", "--set", "model.name=no.such.module:f"],
        ["model.name = 'no.such.module:f'", "No module named"],
    ),
    "no such function": (
        ["train", LINEAR, "@ddp", "--set", "data.name=os.path:samples"],
        ["data.name = 'os.path:samples'", "samples"],
    ),
    "unknown model option": (
        ["train", LINEAR, "@ddp", "--set", "model.options.width=3"],
        ["model.options", "width", "in_features, out_features"],
    ),
    "model option of a wrong type": (
        ["train", LINEAR, "@ddp", "--set", "model.options.in_features=many"],
        ["model.options", "in_features", "'many'", "int"],
    ),
    "model option of a wrong value": (
        ["train", MLP, "@ddp", "--set", "model.options.activation=swish"],
        ["activation = 'swish'", "gelu, relu, tanh"],
    ),
    "data option of a wrong type": (
        ["train", LINEAR, "@ddp", "--set", "data.options.samples=abc"],
        ["data.options", "'abc'"],
    ),
    "data option of a wrong value": (
        ["train", LINEAR, "@ddp", "--set", "data.options.samples=0"],
        ["data.options", "at least 1"],
    ),
    "degrees that do not multiply": (
        ["train", MLP, "@2d", "--set", "parallel.pp=3", "--nproc", "4"],
        ["parallel.pp", "3", "4 processes"],
    ),
    "degrees that do not multiply to compare": (
        ["compare", MLP, "--strategies", "2d", "--set", "parallel.pp=3", "--nproc", "4"],
        ["parallel.pp", "3", "4 processes"],
    ),
    "replicas that do not multiply": (
        ["train", LINEAR, "@fsdp", "--set", "parallel.replicate=3", "--nproc", "4"],
        ["parallel.replicate", "3", "4 processes"],
    ),
    "more stages than layers": (
        ["train", LINEAR, "@pipeline", "--nproc", "2"],
        ["1 layer", "2 stages"],
    ),
    "a partition that does not fit": (
        ["train", MLP, "@pipeline", "--nproc", "2", "--set", "strategy.pipeline.partition=[9, 9]"],
        ["partition [9, 9]", "18 layers", "2 stages"],
    ),
}
for _file, _words in {
    "owned.json": ["train_batch_size", "train.global_batch"],
    "stage3.json": ["zero_optimization.stage = 3", "needs 1"],
    "nowhere.json": ["cannot be read"],
    "not.json": ["not a JSON file"],
    "word.json": ["str", "object"],
    "number.json": ["zero_optimization", "3"],
}.items():
    _words.insert(0, f"'{_file}'")
    CASES[f"ds_config {_file}"] = (
        ["train", LINEAR, "@zero1", "--set", f"strategy.zero1.ds_config={_file}"],
        _words,
    )
# What the parser of the command line refuses.
USAGE: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["trian", LINEAR], ["'trian'"]),
    "no strategy": (["train", LINEAR], ["--strategy", "issing"]),
    "no job": (["compare"], ["JOB", "issing"]),
    "unknown option": (["train", LINEAR, "@ddp", "--procs", "2"], ["--procs"]),
    "no processes": (["train", LINEAR, "@ddp", "--nproc", "0"], ["--nproc", "0", "1"]),
    "no number": (["train", LINEAR, "@ddp", "--nproc", "two"], ["--nproc", "two"]),
    "one argument too many": (["train", LINEAR, "more", "@ddp"], ["more"]),
}
TYPED = ["no such job", "not TOML", "unknown strategy", "unknown strategy to compare"]
TYPED += ["ds_config owned.json"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is typed, with the files that the cases name."""
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Runs the command line in this process: its status, stdout, stderr."""
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    handler = signal.getsignal(signal.SIGTERM)

    def run_main(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "_stdout", sys.stdout)
        monkeypatch.setattr(sys, "argv", ["hybrid", *words])
        with pytest.raises(SystemExit) as leave:
            main()
        return int(leave.value.code or 0), *capfd.readouterr()

    yield run_main
    signal.signal(signal.SIGTERM, handler)


def spell(words: list[str]) -> list[str]:
    """The words as typed, with a folder for the results."""
    spelt = [w for word in words for w in (["--strategy", word[1:]] if word[0] == "@" else [word])]
    return spelt if words[0] == "trian" else [*spelt, "--out", "results"]


def assert_one_line(status: int, stdout: str, stderr: str, words: list[str]) -> None:
    """The promise: 2, nothing on stdout, one line on stderr with these words."""
    assert "Traceback" not in stderr, stderr
    assert (status, stdout) == (2, ""), stderr
    (line,) = stderr.splitlines()
    assert line.startswith("hybrid: ")
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize("case", [*CASES, *USAGE])
def test_a_mistake_is_one_line_and_leaves_no_folder(case: str, folder: Path, run: Run) -> None:
    words, expected = (CASES | USAGE)[case]
    assert_one_line(*run(*spell(words)), expected)
    assert {path.name for path in folder.iterdir()} == set(FILES)


@pytest.mark.parametrize("case", [*TYPED, "unknown command", "no strategy", "no processes"])
def test_a_mistake_as_it_is_typed(case: str, folder: Path) -> None:
    words, expected = (CASES | USAGE)[case]
    absolute = [str(folder / word) if (folder / word).is_file() else word for word in words]
    absolute = [word.replace("=owned", f"={folder}/owned") for word in absolute]
    spelt = [*spell(absolute)]
    if "results" in spelt:
        spelt[-1] = str(folder / "results")
    done = hybrid_command(*spelt, timeout=60)
    expected = [word.strip("'") for word in expected]
    assert_one_line(done.returncode, done.stdout, done.stderr, expected)
    assert not (folder / "results").exists()


def test_json_changes_nothing_about_it(folder: Path) -> None:
    words = ["compare", LINEAR, "--strategies", "nonsense", "--json", "--out", str(folder / "out")]
    done = hybrid_command(*words, timeout=60)
    assert_one_line(done.returncode, done.stdout, done.stderr, ["'nonsense'", "single, ddp"])


def test_ranks_of_a_launcher_refuse_another_number_of_processes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = run("train", LINEAR, "--strategy", "ddp", "--nproc", "3")
    assert_one_line(*found, ["--nproc 3", "2 processes"])


def test_settings_without_effect_are_warned_of_before_the_mistake(run: Run) -> None:
    words = ["--set", "optimizer.eps=1e-6", "--strategy", "nonsense"]
    status, stdout, stderr = run("train", LINEAR, *words)
    warning, mistake = stderr.splitlines()
    assert (status, stdout) == (2, "")
    assert warning.startswith("hybrid: warning: optimizer.eps") and "nonsense" in mistake
