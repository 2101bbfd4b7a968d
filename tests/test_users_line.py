"""An error in a user's code names the innermost line of that code, wherever it comes up."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.data.batches import BatchPlan
from hybrid.job import traces
from hybrid.job.errors import JobError, first_line
from hybrid.job.traces import at_users_line, users_line
from hybrid.launch.blame import Cause
from hybrid.launch.failures import RankStatus, leave_error
from hybrid.launch.first_cause import first_cause
from hybrid.launch.lost_peers import PEER_LOSS_MESSAGES
from hybrid.launch.placement import Placement
from hybrid.models import build_model
from tests import own_code
from tests.conftest import ROOT, hybrid_command, small_job

FILE = ROOT / "tests" / "own_code.py"


def line_of(mark: str) -> str:
    """FILE:LINE of the line that has a mark."""
    lines = FILE.read_text().splitlines()
    return f"tests/own_code.py:{next(i for i, x in enumerate(lines, 1) if f'# LINE {mark}' in x)}"


def own_job(raises: str = "", **changes: Any) -> Any:
    """A job whose code is tests/own_code.py."""
    changes = {"train__global_batch": 11, "train__steps": 4} | changes
    return small_job(
        model={"name": "tests.own_code:model", "options": {"raises": raises}},
        data={"name": "tests.own_code:data"},
        **changes,
    )


def caught(act: Any, *arguments: Any) -> Exception:
    """What a function raises."""
    try:
        act(*arguments)
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_root", "without_tryout")
@pytest.mark.parametrize("raises", ["shape", "checkpoint", "hook", "loss"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_an_error_in_training_names_its_line(raises: str, strategy: str) -> None:
    error = caught(hybrid.train, own_job(raises), strategy)
    assert users_line(error) == line_of(raises)
    assert first_line(error).endswith(f", at {line_of(raises)}")


@pytest.mark.usefixtures("at_root")
def test_an_error_in_a_librarys_code_names_the_line_that_called_it() -> None:
    error = caught(own_code.optimizer_step, torch.ones(2))
    assert users_line(error) == line_of("optimizer")


@pytest.mark.usefixtures("at_root")
def test_an_error_in_a_worker_of_a_loader_names_its_line_there() -> None:
    samples = own_code.Samples(5, bad=3)
    error = caught(list, torch.utils.data.DataLoader(samples, num_workers=1))
    assert str(error).startswith("Caught OSError in DataLoader worker process 0")
    assert first_line(error) == f"OSError: no such picture, at {line_of('data')}"


def test_an_error_that_is_not_of_the_users_code_names_no_line() -> None:
    linear, code = nn.Linear(3, 3), "linear(torch.ones(2, 2))"
    space = {"linear": linear, "torch": torch}
    error = caught(eval, compile(code, str(Path(nn.__file__)), "eval"), space)
    assert error.__traceback__
    error.__traceback__ = error.__traceback__.tb_next  # without this file's own frame
    assert users_line(error) == "" == at_users_line(error)


def test_a_line_is_of_the_error_that_another_one_follows_from() -> None:
    try:
        try:
            own_code.model("model")
        except KeyError as error:
            raise error.with_traceback(None) from caught(own_code.model, "model")
    except KeyError as error:
        error.__traceback__ = None
        assert users_line(error).endswith(line_of("model"))


def test_a_folder_of_python_or_of_packages_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert traces.is_users(str(FILE)) and traces.is_users("<ipython-input-3-abc>")
    assert not any(map(traces.is_users, (torch.__file__, json.__file__, hybrid.__file__, "<x>")))
    assert not traces.is_users(str(Path(sys.executable).parent / "hybrid"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import torch\nx = [\n", "was never closed"),
        ("import torch\n\nx = undefined\n", "name 'undefined' is not defined"),
        (
            "import sys\n\nsys.exit(2)\n",
            "SystemExit: it ends the program, with status 2",
        ),
    ],
)
def test_an_error_at_import_names_its_line(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bad_{random.getrandbits(60)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(JobError) as raised:
        build_model(small_job(model={"name": f"{name}:model"}))
    line = 2 if "[" in text else 3
    said = str(raised.value)
    assert words in said and said.endswith(f", at {name}.py:{line}"), said
    assert said.startswith(f"model.name = '{name}:model': cannot be imported: ")


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(
    ("raises", "words"),
    [
        ("model", "KeyError: 'no such key'"),
        ("exit", "SystemExit: it ends the program, with status 1: usage: train.py"),
    ],
)
def test_an_error_of_a_model_function_is_one_line_of_the_job(raises: str, words: str) -> None:
    said = str(caught(build_model, own_job(raises)))
    given = f"model.options = {{'raises': '{raises}'}} of 'tests.own_code:model'"
    assert said == f"{given}: {words}, at {line_of(raises)}"


@pytest.mark.usefixtures("at_root")
def test_what_a_rank_leaves_names_line_and_log(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    status = RankStatus(own_job(), Placement(2, 4, 2, "hybrid"), logs)
    leave_error(caught(own_code.model, "model"), status)
    where = f", at {line_of('model')} (log: {logs / 'rank2.log'})"
    found = first_cause({2: 1}, logs, 0.0)
    assert found.message == f"KeyError: 'no such key' (starting){where}"
    told = Cause(2, "node7", "KeyError: 'no such key'", "in step 3", where)
    assert told.describe().endswith(f"(in step 3){where}")


def test_a_lost_peer_is_no_fault_of_the_line_where_it_was_noticed(tmp_path: Path) -> None:
    def wait() -> None:
        raise RuntimeError(f"gloo: {PEER_LOSS_MESSAGES[0]}")

    leave_error(caught(wait), RankStatus(own_job(), Placement(0, 2, 0, "hybrid"), tmp_path))
    assert ", at " not in first_cause({0: 1}, tmp_path, 0.0).message


@pytest.mark.parametrize(
    ("strategy", "nproc"), [("pipeline", 2), pytest.param("zero1", 4, marks=pytest.mark.slow)]
)
def test_the_command_and_the_record_name_line_and_log(
    strategy: str, nproc: int, tmp_path: Path
) -> None:
    """The loss of the last stage; one sample that some rank of four reads, drawn by chance."""
    job = own_job("rank") if strategy == "pipeline" else own_job()
    plan = BatchPlan(50, 11, 4, 2, job.train.seed)
    places = [plan.micro_batch_ids(step, share) for step in range(4) for share in range(4)]
    drawn = random.choice([i for ids in places for part in ids for i in part if i >= 8])
    bad = [] if strategy == "pipeline" else ["--set", f"data.options.bad={drawn}"]
    file, out = tmp_path / "job.json", tmp_path / "run"
    file.write_text(json.dumps(hybrid.job.file.to_dict(job)))
    words = ["train", str(file), "--strategy", strategy, "--nproc", str(nproc), "--out", str(out)]
    done = hybrid_command(*words, *bad)
    assert done.returncode == 1, done.stderr
    line = next(x for x in done.stderr.splitlines() if x.startswith("hybrid: rank "))
    rank = line.split()[2]
    where = line_of("rank" if strategy == "pipeline" else "data")
    assert f", at {where} " in line and line.endswith(f" (log: {out}/logs/rank{rank}.log)"), line
    assert f"hybrid: {json.loads((out / 'record.json').read_text())['reason']}" == line
    assert rank == "1" or strategy != "pipeline"
