"""However a function of the user's own raises or leaves, it is one line with the field and 2.

`tests/leaving.py` has the functions. None may look like a run that ended well, or that lacks a
package of ours.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid.cli import main
from hybrid.job.errors import CheckFailed, JobError, exit_status
from hybrid.job.users_code import held_exit, passes
from hybrid.launch.stopping import end_now
from hybrid.strategies import registry
from hybrid.training.check import check_job
from tests.leaving import KINDS

HERE = "tests.leaving"
PLAIN: dict[str, Any] = {
    "model": {"name": f"{HERE}:model", "options": {"kind": "key", "where": "nowhere"}},
    "data": {"name": f"{HERE}:data", "options": {"kind": "key", "where": "nowhere"}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 5, "steps": 3},
}


def job_with(where: str, kind: str) -> hybrid.Job:
    """The plain job, in which one place does it."""
    options = {"kind": kind, "where": where}
    changes: dict[str, Any] = {
        **{key: {"model.options": options} for key in ("model", "layer", "loss")},
        **{key: {"data.options": options} for key in ("data", "length", "sample", "collate")},
        "optimizer": {"optimizer.name": f"{HERE}:optimizer", "optimizer.options": {"kind": kind}},
        "schedule": {"schedule": {"name": f"{HERE}:schedule", "options": {"kind": kind}}},
        "metric": {"train.metrics": [f"{HERE}:metric_{kind.replace(' ', '_')}"]},
    }[where]
    return hybrid.load_job(PLAIN, changes)


FIELDS = {
    **dict.fromkeys(("model", "layer", "loss"), "model."),
    **dict.fromkeys(("data", "length", "sample", "collate"), "data."),
    "optimizer": "optimizer.",
    "schedule": "schedule.name = ",
    "metric": "train.metrics = ",
}


def test_the_plain_job_is_sound() -> None:
    check_job(hybrid.load_job(PLAIN))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", FIELDS)
def test_it_is_one_line_with_the_field_and_the_users_line(where: str, kind: str) -> None:
    with pytest.raises(JobError) as refused:
        check_job(job_with(where, kind))
    said, real_exit = str(refused.value), os._exit
    assert said.startswith(FIELDS[where]) and KINDS[kind][1] in said, said
    assert "tests/leaving.py:" in said and "\n" not in said and len(said) < 900
    assert exit_status(refused.value) == 2 and real_exit is os._exit


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_of_ones_own_too(kind: str) -> None:
    with pytest.raises(JobError, match="leaving': its layout raised") as refused:
        registry.find_layout(job_with("model", kind), HERE, 2)
    assert KINDS[kind][1] in str(refused.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("import sys\nsys.exit(0)\n", "status 0, at NAME.py:2"),
        ("import os\nos._exit(0)\n", "status 0, at NAME.py:2"),
        ("import os\nos._exit(3)\n", "status 3, at NAME.py:2"),
        ("raise KeyError('k')\n", "KeyError: 'k', at NAME.py:1"),
        ("class Odd(BaseException): pass\nraise Odd('x')\n", "Odd: x, at NAME.py:2"),
        ("import no_such_thing\n", "No module named 'no_such_thing', at NAME.py:1"),
        ("def model(:\n", "invalid syntax"),
        ("raise KeyboardInterrupt\n", ""),
    ],
)
def test_a_module_that_does_it_while_it_is_imported(
    text: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    name = f"leaves_{random.getrandbits(60)}"
    (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "job.toml").write_text(
        f'model = {{name = "{name}:model"}}\ndata = {{name = "random"}}\n'
        'optimizer = {name = "sgd", lr = 0.1}\ntrain = {global_batch = 5, steps = 3}\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["hybrid", "train", "job.toml", "--strategy", "ddp"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main()
    signal.signal(signal.SIGTERM, before)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("hybrid: ")]
    assert ended.value.code in ((2,) if words else (2, 130))  # 130: it looks like Ctrl-C
    assert len(lines) == 1 and words.replace("NAME", name) in lines[0], lines
    assert not words or f"model.name = '{name}:model': cannot be imported" in lines[0]


def test_a_lack_of_memory_is_no_fault_of_the_job() -> None:
    KINDS["memory"] = (lambda: (_ for _ in ()).throw(MemoryError()), "")
    try:
        with pytest.raises(CheckFailed, match="memory ran out: MemoryError") as failed:
            check_job(job_with("model", "memory"))
    finally:
        del KINDS["memory"]
    assert exit_status(failed.value) == 1


def test_a_signal_that_we_handle_is_no_fault_of_the_code_that_ran() -> None:
    with pytest.raises(SystemExit) as ended:
        end_now(signal.SIGTERM)
    assert passes(ended.value) and passes(KeyboardInterrupt())
    with pytest.raises(SystemExit) as left:
        KINDS["exit 3"][0]()
    assert not passes(left.value)


def test_a_forked_child_still_leaves_as_it_asks_for() -> None:
    with held_exit():
        child = os.fork()
        if child == 0:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
