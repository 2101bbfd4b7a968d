"""Functions that a caller in Python gives themselves are there in every rank, and nothing else is.

The ranks of these tests are forked from the process of pytest, which has torch and its threads."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import hybrid
from hybrid.job.errors import JobError
from hybrid.job.given import describe, given_functions, name_of, naming
from hybrid.launch import fork_here
from hybrid.launch.warm import warm_process, warm_ranks
from hybrid.models import build_model
from tests import own_code
from tests.conftest import ROOT, small_job

GPU = "this process has used the GPU and so cannot be forked"


@pytest.fixture(autouse=True)
def a_warm_process_of_its_own() -> Iterator[None]:
    """One for each test, so that the other tests keep theirs."""
    with warm_ranks(fresh=True), warm_ranks():
        yield


def given_job(**changes: Any) -> Any:
    """The small job, without the name of a model or of data."""
    names = {"model": {"name": "given"}, "data": {"name": "given"}}
    return small_job(**names, **changes)


class Mark:
    """Something with an end."""


def test_ranks_have_what_the_caller_has(tmp_path: Path) -> None:
    width, ended, mark = 11, tmp_path / "ended", Mark()
    weakref.finalize(mark, ended.write_text, "once, by the caller")
    torch.randn(400, 400) @ torch.randn(400, 400)  # torch's threads run here

    def build(layers: int) -> Any:
        assert mark, "the caller's object"
        middle = [own_code.Layer(width, width) for _ in range(layers)]
        return [nn.Linear(13, width), *middle, nn.Linear(width, 4)], hybrid.cross_entropy

    job = given_job(model__options={"layers": 3}, train__steps=3, train__global_batch=11)
    strategies = ["ddp", "pipeline"]
    result = hybrid.compare(
        job, strategies, 2, tmp_path / "out", model=build, data=lambda: own_code.data()
    )
    assert result.ok, {name: record.reason for name, record in result.strategies.items()}
    assert result.job["model"]["name"].endswith("ranks_have_what_the_caller_has.<locals>.build")
    warm = warm_process()
    assert warm is not None and not warm.functions, "the next run has a warm process as ever"
    assert not ended.exists() and given_functions() == {}
    threads = {record.environment["threads_per_rank"] for record in result.strategies.values()}
    assert threads == {1}


def test_a_rank_that_fails_is_told_by_its_line_and_none_stays(tmp_path: Path) -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> Any:
        if os.environ.get("RANK") == "1" and torch.is_grad_enabled():
            raise ValueError("planted")  # LINE planted
        return hybrid.cross_entropy(output, target)

    job, before = given_job(train__steps=3), psutil.Process().children(recursive=True)
    result = hybrid.compare(
        job,
        ["ddp"],
        2,
        tmp_path,
        model=lambda: (own_code.model()[0], loss),
        data=lambda: own_code.data(),
    )
    lines = Path(__file__).read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "# LINE planted" in text)
    record = result.strategies["ddp"]
    assert record.status == "failed" and f"test_given.py:{line} (log: " in str(record.reason)
    assert str(record.reason).startswith("rank 1 on ")
    hybrid.launch.warm._holder.get().close()
    assert not set(psutil.Process().children(recursive=True)) - set(before)


def test_train_takes_them_in_this_process() -> None:
    job = given_job(train__steps=2)
    record = hybrid.train(job, "single", model=own_code.model, data=lambda: own_code.data())
    by_name = small_job(
        model={"name": "tests.own_code:model"}, data={"name": "tests.own_code:data"}, train__steps=2
    )
    assert record.steps == hybrid.train(by_name, "single").steps


def test_where_ranks_cannot_be_forked_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> None: ...

    job = given_job()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(JobError) as raised:
        hybrid.compare(job, ["ddp"], 2, tmp_path, model=build)
    said = str(raised.value)
    assert f"since {GPU}: put it into a file FILE.py, and set model.name to 'FILE:build'" in said
    assert said.startswith("model = tests.test_given:") and "test_given.py:" in said
    assert "\n" not in said and not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(JobError, match="since each rank is to start afresh: put it"):
        hybrid.compare(job, ["ddp"], 2, tmp_path, fresh_ranks=True, data=build)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert fork_here.why_not() == "processes are forked on Linux alone"


def test_a_function_that_others_can_import_needs_no_fork() -> None:
    with naming(small_job(), own_code.model, own_code.data, GPU) as job:
        assert (job.model.name, job.data.name) == ("tests.own_code:model", "tests.own_code:data")
        assert given_functions() == {}
    hidden = functools.wraps(own_code.model)(lambda: None)  # another one has its name
    with pytest.raises(JobError), naming(small_job(), hidden, None, GPU):
        pass


def test_names_are_those_of_the_definition() -> None:
    hf = type("Build", (), {"__module__": "hf", "__call__": lambda self: own_code.model()})()
    assert name_of(hf) == "./hf:Build", "not a model of transformers"
    assert name_of(functools.partial(own_code.model)) == "functools:partial"
    line = own_code.model.__code__.co_firstlineno
    assert describe(own_code.model).endswith(f"own_code.py:{line})")
    with pytest.raises(JobError, match=r"^data = 3: is not a function"):
        hybrid.compare(small_job(), ["ddp"], data=3)  # type: ignore[arg-type]


def test_functions_are_there_until_the_call_ends() -> None:
    with naming(given_job(), lambda: own_code.model(), None) as job:
        assert len(build_model(job)[0]) == 4
        with naming(job, None, own_code.data) as inner:
            assert len(given_functions()) == 2 and inner.model == job.model
        assert len(given_functions()) == 1
    with pytest.raises(JobError):
        build_model(job)


def test_a_later_process_says_where_the_function_was() -> None:
    with pytest.raises(JobError, match=r"'__main__:build': was given as a function in Python"):
        build_model(small_job(model={"name": "__main__:build"}))


SCRIPT = """
import sys
import hybrid
from tests.conftest import small_job

def build():
    from tests.own_code import model
    return model()

job = small_job(model={"name": "given"}, data={"name": "tests.own_code:data"}, train__steps=10**6)
hybrid.compare(job, ["ddp"], 2, sys.argv[1], model=build, reference="ddp")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_caller(number: int, tmp_path: Path) -> None:
    (tmp_path / "demo.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "demo.py"), str(tmp_path / "out")]
    run = subprocess.Popen(
        words,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "ddp" / "steps.jsonl").exists():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()
        time.sleep(0.1)
    children = psutil.Process(run.pid).children(recursive=True)
    assert len(children) == 3, "a warm process and two ranks"
    run.send_signal(number)
    _, stderr = run.communicate(timeout=30)
    assert run.returncode in (-number, 1, 130)
    assert not psutil.wait_procs(children, timeout=15)[1]
    assert ("KeyboardInterrupt" in stderr) == (number == signal.SIGINT)
