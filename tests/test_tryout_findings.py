"""What can be trained, but not under every strategy, or not compared, is found and not refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid.cli import main
from hybrid.job.errors import Unsupported
from hybrid.job.file import to_dict
from hybrid.training.check import CheckedJob, check_job
from tests.bad_data import DATA
from tests.bad_luggage import LOSSES, MODELS
from tests.test_tryout_refused import BAD
from tests.tryout_jobs import SEVERAL, make_job, of_data, of_loss, of_model

# name: (changes in the job, strategies that it touches, whether it bars them, words)
FOUND: dict[str, tuple[dict[str, Any], tuple[str, ...], bool, list[str]]] = {
    "noise": (
        of_model("noise"),
        SEVERAL,
        False,
        ["layer 0 (Odd)", "by randn_like", "cannot be compared"],
    ),
    "numbers of numpy": (of_model("numpy"), (), False, ["layer 0 (Odd)", "numpy or random"]),
    "numbers of random": (of_model("random"), (), False, ["layer 0 (Odd)", "numpy or random"]),
    "a state": (of_model("state"), (), False, ["layer 0 (Odd)", "state of its own"]),
    "a mean over the batch": (of_model("centred"), SEVERAL, False, ["layer 0 (Odd)", "mixes"]),
    "a batch norm": (of_model("normed"), SEVERAL, False, ["1 (BatchNorm1d)", "statistics"]),
    "a buffer that moves": (of_model("moving"), SEVERAL, False, ["buffer 0.seen", "moves"]),
    "a buffer of nan": (of_model("nan buffer"), (), False, ["buffer 0.table", "nan"]),
    "an unused layer": (
        of_model("unused"),
        ("ddp",),
        True,
        ["0.spare.weight and 0.spare.bias", "no gradient", "requires_grad_(False)"],
    ),
    "a branch": (
        of_model("branch"),
        ("ddp", "fsdp", "zero1", "zero2", "zero3", "2d"),
        True,
        ["1.a.weight", "some micro-batches of 3 samples"],
    ),
    "a loss that draws": (of_loss("shaken"), (), False, ["loss draws random numbers"]),
    "data of another time": (of_data("counted"), (), False, ["sample 0", "read a second time"]),
    "a test set of nan": (of_data("nan test"), (), False, ["sample 0 of the test set"]),
    "a long warm-up": (
        {"schedule__warmup_steps": 8},
        (),
        False,
        ["schedule.warmup_steps = 8", "7 of 8 steps", "valid: 7"],
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_can_be_trained_all_the_same_is_found(case: str) -> None:
    changes, strategies, fatal, words = FOUND[case]
    checked = check_job(make_job(**changes))
    (found, *_) = checked.findings
    assert (found.strategies, found.fatal) == (strategies, fatal)
    assert [word for word in words if word not in found.text] == [], found.text
    assert len(checked.findings) <= 1 + fatal and all(not f.fatal for f in checked.findings[1:])
    possible = {name: can_run(checked, name) for name in ("single", "ddp", "fsdp", "zero3")}
    assert possible == {name: not (fatal and name in strategies) for name in possible}


def can_run(checked: CheckedJob, name: str) -> bool:
    try:
        checked.plan(name, 2)
    except Unsupported as error:
        assert str(error) in [f.text for f in checked.findings]
        return False
    return True


UNCUT = {
    "scalar": ("shape [1]", SEVERAL[2:]),
    "frozen scalar": ("shape [1]", SEVERAL[2:]),
    "empty": ("no elements", ("fsdp", "zero3")),
}


@pytest.mark.parametrize(
    ("model", "mend", "barred"),
    [(name, *row) for name, row in UNCUT.items()],
)
def test_strategies_that_cut_tensors_refuse_what_has_no_axes_or_elements(
    model: str, mend: str, barred: tuple[str, ...]
) -> None:
    checked = check_job(make_job(**of_model(model)))
    for name in ("single", "ddp", "fsdp", "zero1", "zero3", "pipeline"):
        if name not in barred:
            checked.plan(name, 1 if name == "single" else 2)
            continue
        with pytest.raises(Unsupported, match=rf"0\.extra.*{re.escape(mend)}"):
            checked.plan(name, 2)


def test_parameters_without_a_gradient_bar_those_who_decay_or_wait_for_them() -> None:
    checked = check_job(make_job(**of_model("unused", optimizer__weight_decay=0.1)))
    barred = {name for name in ("single", *SEVERAL[:-1]) if not can_run(checked, name)}
    assert barred == {"ddp", "zero1", "zero2", "zero3", "pipeline"}
    (kept,) = checked.warnings("fsdp")
    assert "leaves them as they are" in kept and checked.warnings("single") == [kept]
    by_torch = {"strategy__pipeline": {"engine": "torch"}, "optimizer__weight_decay": 0.1}
    checked = check_job(make_job(**of_model("unused", **by_torch)))
    assert can_run(checked, "pipeline") and checked.warnings("pipeline") == [kept]


def test_every_luggage_is_looked_at() -> None:
    jobs = [changes for changes, *_ in (*BAD.values(), *FOUND.values())]
    jobs += [of_model(name) for name in UNCUT]
    for key, table in (("model__options", MODELS), ("data__options", DATA)):
        assert set(table) == {job.get(key, {}).get("kind", "plain") for job in jobs} & {*table}
    losses = {job["model"].get("options", {}).get("kind") for job in jobs if "model" in job}
    assert set(LOSSES) == losses - {None}


def test_a_lone_sample_in_a_batch_norm_bars_the_layouts_that_have_one() -> None:
    def plan(strategy: str, nproc: int, **train: int) -> str:
        changed = checked.job.train.model_copy(update=train)
        job = checked.job.model_copy(update={"train": changed})
        try:
            dataclasses.replace(checked, job=job).plan(strategy, nproc)
        except Unsupported as error:
            return str(error)
        return ""

    checked = check_job(make_job(**of_model("normed")))
    assert plan("single", 1) == plan("ddp", 2) == plan("pipeline", 2) == ""
    barred = plan("ddp", 4)  # 12 samples, 4 ranks, 2 micro-batches: some have one
    assert "1 (BatchNorm1d)" in barred and "a batch of 12 samples in 8 micro-batches" in barred
    last = plan("single", 1, global_batch=47, steps=2)  # the second batch has one
    assert "a batch of 1 sample in 2 micro-batches" in last and "train.global_batch" in last
    assert plan("single", 1, global_batch=47, steps=1) == ""


def test_a_check_says_what_stands_in_the_way_of_which_strategy(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    job = tmp_path / "job.json"
    settings = make_job(**of_model("scalar"), variant__bf16={"strategy": "ddp"})
    job.write_text(json.dumps(to_dict(settings)))
    arguments = ["check", str(job), "--json", "--nproc", "2"]
    monkeypatch.setattr("sys.argv", ["hybrid", *arguments, "--set", "schedule.warmup_steps=9"])
    with pytest.raises(SystemExit) as ended:
        main()
    answer = json.loads(capfd.readouterr().out)
    assert ended.value.code == 0 and answer["ok"] and answer["nproc"] == 2
    one = answer["strategies"]
    barred = {name for name, found in one.items() if not found["possible"]}
    assert barred == {"fsdp", "zero1", "zero2", "zero3", "pipeline", "2d"}
    assert all("0.extra" in one[name]["reason"] for name in barred - {"2d"})
    assert "2 stages x 2 or more columns" in one["2d"]["reason"]
    assert [f["fatal"] for f in answer["findings"]] == [False]
    assert all("warmup_steps" in one[name]["warnings"][0] for name in ("single", "ddp", "bf16"))


def test_what_was_found_stands_in_the_record_and_on_the_page(tmp_path: Path) -> None:
    checked = check_job(make_job(**of_model("moving")))
    assert checked.warnings("single") == [], "it is about those that cut the batch"
    assert "0.seen" in checked.warnings("ddp")[0]
    long = make_job(schedule__warmup_steps=8, train__steps=1)
    result = hybrid.compare(long, ["single"], 1, tmp_path)
    (line,) = result.strategies["single"].warnings
    assert "schedule.warmup_steps = 8" in line
    for name in ("compare.md", "report.html", "single/record.json"):
        assert "schedule.warmup_steps = 8" in (tmp_path / name).read_text(), name


def test_a_process_alone_records_what_it_found() -> None:
    record = hybrid.train(make_job(schedule__warmup_steps=8, train__steps=1), "single")
    assert "schedule.warmup_steps = 8" in record.warnings[0]
