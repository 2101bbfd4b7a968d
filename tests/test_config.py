"""The job is read strictly, and every refusal is one line: the field, the value, what is valid."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

import hybrid
from hybrid.job.errors import JobError
from hybrid.job.file import load_job, to_dict
from hybrid.job.recovery import Guard
from hybrid.job.schema import Job, resolve_lengths
from hybrid.strategies.registry import NAMES

JOB: dict[str, Any] = {
    "model": {"name": "linear"},
    "data": {"name": "random"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"global_batch": 6, "steps": 3},
}
KINDS = {  # every field of the job, by the kind of value it takes
    "count": [
        *("train.global_batch", "train.micro_batches", "train.epochs", "train.steps"),
        *(f"parallel.{axis}" for axis in ("pp", "dp", "replicate", "shard")),
        *(f"strategy.{name}.micro_batches" for name in NAMES),
        *("strategy.ddp.powersgd_rank", "strategy.ddp.bucket_cap_mb"),
        *("checkpoint.every", "checkpoint.keep", "guard.window", "guard.max_in_a_row"),
        "strategy.local_sgd.emulate_replicas",
        "strategy.local_sgd.move_weights",
        "strategy.single.emulate_ranks",
        "strategy.single.move_weights",
        *("launch.start_timeout_s", "launch.collective_timeout_s", "log.every"),
        *("launch.setup_timeout_s", "train.eval_batches"),
    ],
    "whole": ["train.seed", "train.eval_every", "schedule.warmup_steps", "data.workers"],
    "number": [
        *(f"optimizer.{key}" for key in ("lr", "momentum", "eps", "weight_decay")),
        *("schedule.min_lr", "train.clip_norm", "guard.spike_factor"),
    ],
    "bool": [
        *("train.activation_checkpointing", "train.compile"),
        *("strategy.fsdp.reshard_after_forward", "strategy.fsdp.sync_each_batch"),
        "strategy.zero2.reduce_once",
        *("launch.allow_known_bad", "launch.trust_pickle", "checkpoint.async", "model.on_meta"),
    ],
    "text": [
        *("model.name", "data.name", "model.weights", "checkpoint.best"),
        *(f"strategy.{name}.ds_config" for name in ("zero1", "zero2", "zero3", "pipeline", "2d")),
    ],
    "section": [
        *(f"{name}.options" for name in ("model", "data", "optimizer", "schedule")),
        *("variant", "proxy"),
    ],
    "choice": [
        *("optimizer.name", "schedule.name", "train.precision", "launch.device"),
        *("guard.non_finite", "guard.on_spike"),
        *("strategy.pipeline.engine", "strategy.pipeline.schedule"),
        *("strategy.ddp.comm_hook", "strategy.ddp.broadcast_buffers", "strategy.2d.zero_stage"),
    ],
    "partition": ["strategy.pipeline.partition", "strategy.2d.partition"],
    "sync_every": ["strategy.local_sgd.sync_every"],
    "betas": ["optimizer.betas"],
    "kinds": ["optimizer.no_decay"],
    "texts": ["log.trackers", "train.metrics"],
}
NOT_NUMBERS = [True, "3", [1], None]
WRONG = {
    "count": [*NOT_NUMBERS[:3], 2.5, 2.0, math.nan, 0, -1],
    "whole": [*NOT_NUMBERS, 2.5, -1],
    "number": [*NOT_NUMBERS, math.nan, math.inf, -1.0],
    "bool": [1, 0, "true", None],
    "text": [5, True, ["x"]],
    "section": [3, "x", ["x"]],
    "choice": ["nonsense", 5, True],
    "partition": ["nonsense", [], [0], [1, True], ["1"], 2],
    "sync_every": ["step", 0, True, 1.5, "3"],
    "betas": [0.9, [0.9], [0.9, math.nan], ["0.9", 0.999], [0.9, True], [1.5, 0.9], [0.9, -1]],
    "kinds": ["norms", ["weights"], [1], 3],
    "texts": ["tensorboard", [1], [None], 3],
}
CASES = [(f, v) for kind, fields in KINDS.items() for f in fields for v in WRONG[kind]]


def refusal(source: Any, overrides: Any = ()) -> str:
    """What JobError says, which is one line."""
    with pytest.raises(JobError) as error:
        load_job(source, overrides)
    assert len(str(error.value).splitlines()) == 1, str(error.value)
    return str(error.value)


def walk(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of the job."""
    for name, field in section.model_fields.items():
        kind, path = field.annotation, prefix + (field.alias or name)
        kind = next((one for one in get_args(kind) if one is Guard), kind)  # it may be left out
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from walk(kind, path + ".")
        else:
            yield path


FIELDS = list(walk(Job))


def test_the_table_above_has_every_field() -> None:
    assert sorted(f for fields in KINDS.values() for f in fields) == sorted(FIELDS)


@pytest.mark.parametrize("field", [*FIELDS, *JOB, "schedule", "strategy.2d", "strategy.zero1"])
def test_unknown_key_names_the_nearest_one(field: str) -> None:
    section, _, key = field.rpartition(".")
    message = refusal(JOB, {f"{field}_": 1})
    assert f"job: {field}_: unknown key; did you mean {key!r}? valid: " in message
    start = f"{section}." if section else ""
    keys = {f.removeprefix(start).split(".")[0] for f in FIELDS if f.startswith(start)}
    assert set(message.partition("valid: ")[2].split(", ")) == keys


def test_unknown_key_that_is_like_no_other_lists_the_valid_ones() -> None:
    message = refusal(JOB, {"train.qqq": 1})
    assert "train.qqq: unknown key; valid: global_batch, micro_batches, epochs, steps" in message
    assert "did you mean" not in message


def test_the_python_name_of_the_2d_section_is_no_second_name_for_it() -> None:
    assert "strategy.two_d: unknown key" in refusal(JOB, {"strategy.two_d.zero_stage": 0})


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{f}={v!r}" for f, v in CASES])
def test_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    message = refusal(JOB, {field: value})
    named, colon, valid = message.removeprefix("job: ").partition(": ")
    assert named.split(" = ")[0] == field and colon and valid
    shown = [repr(value), *map(repr, value)] if isinstance(value, list) else [repr(value)]
    assert any(text in message for text in shown), message


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("optimizer.lr", 0.0, "greater than 0"),
        ("optimizer.momentum", 1.0, "less than 1"),
        ("optimizer.eps", 0.0, "greater than 0"),
        ("train.seed", 2**63, f"less than {2**63}"),
        ("parallel.pp", 0, "greater than or equal to 1"),
        ("schedule.name", "exp", "'exp': valid: constant, linear, cosine, package.module"),
        ("strategy.2d.zero_stage", 2, "0 or 1"),
        ("strategy.ddp.comm_hook", "fp8", "'none', 'bf16', 'fp16' or 'powersgd'"),
        ("strategy.pipeline.partition", "even", "'uniform' or 'parameters'"),
        ("strategy.local_sgd.sync_every", "batch", "'epoch'"),
    ],
)
def test_a_refusal_says_what_would_be_valid(field: str, value: Any, bound: str) -> None:
    assert bound in refusal(JOB, {field: value})


@pytest.mark.parametrize("section", JOB)
def test_missing_section_is_named(section: str) -> None:
    rest = {name: value for name, value in JOB.items() if name != section}
    assert f"job: {section}: missing" in refusal(rest)


@pytest.mark.parametrize("field", ["model.name", "optimizer.lr", "train.global_batch"])
def test_missing_key_is_named(field: str) -> None:
    section, _, key = field.partition(".")
    rest = JOB | {section: {k: v for k, v in JOB[section].items() if k != key}}
    assert f"job: {field}: missing" in refusal(rest)


@pytest.mark.parametrize("section", JOB)
def test_section_that_is_a_value_is_refused(section: str) -> None:
    assert f"job: {section} = 3: Input should be a valid dictionary" in refusal(JOB | {section: 3})


def test_exactly_one_of_epochs_and_steps() -> None:
    both = JOB | {"train": {"global_batch": 6, "steps": 3, "epochs": 2}}
    assert "train: epochs = 2, steps = 3: give one" in refusal(both)
    neither = JOB | {"train": {"global_batch": 6}}
    assert "train: epochs = None, steps = None: give one" in refusal(neither)


def test_an_overriding_length_takes_the_place_of_the_other() -> None:
    by_epochs = load_job(JOB, ["train.epochs=2"])
    assert (by_epochs.train.epochs, by_epochs.train.steps) == (2, None)
    back = load_job(to_dict(by_epochs), ["train.steps=4"])
    assert (back.train.epochs, back.train.steps) == (None, 4)
    assert JOB["train"]["steps"] == 3, "the mapping given stays as it was"
    assert "train" in refusal(JOB | {"train": 3}, ["train.steps=4"])


def test_a_long_value_is_cut_short() -> None:
    assert len(refusal(JOB | {"data": {"name": ["x" * 500]}})) < 200


def test_a_job_cannot_be_changed_in_place() -> None:
    job = load_job(JOB)
    with pytest.raises(ValidationError):
        job.train.steps = 4  # type: ignore[misc]


def test_whole_numbers_are_numbers() -> None:
    assert load_job(JOB, {"optimizer.lr": 1}).optimizer.lr == 1.0


def test_public_names_are_these() -> None:
    assert hybrid.load_job is load_job and hybrid.JobError is JobError and hybrid.Job is Job


def test_written_out_a_job_comes_back_equal(tmp_path: Path) -> None:
    changes = {
        "strategy.2d.zero_stage": 0,
        "strategy.pipeline.partition": [2, 1],
        "strategy.local_sgd.sync_every": 4,
        "optimizer.name": "adamw",
        "optimizer.betas": [0.8, 0.9],
        "model.options": {"sizes": [4, 3], "deep": {"a": [{"b": 1.5}]}, "empty": {}},
        "schedule.name": "cosine",
    }
    job = load_job(JOB, changes)
    path = tmp_path / "job.json"
    path.write_text(json.dumps(to_dict(job), allow_nan=False))
    assert load_job(path) == job
    assert load_job(to_dict(job)) == job
    assert to_dict(job)["strategy"]["2d"] == {"partition": "uniform", "zero_stage": 0}


@pytest.mark.parametrize("value", [None, math.inf, math.nan], ids=repr)
def test_an_option_is_kept_as_it_is_or_refused(value: float | None) -> None:
    try:
        job = load_job(JOB, {"model.options": {"a": value}})
        text = json.dumps(to_dict(job), allow_nan=False)
    except JobError as error:
        assert "model.options" in str(error)
    else:
        assert repr(load_job(json.loads(text)).model.options) == repr(job.model.options)


def test_each_setting_without_effect_warns() -> None:
    def warned(**changes: Any) -> list[str]:
        return [line.split()[0] for line in load_job(JOB, changes).warnings()]

    assert warned() == []
    assert warned(**{"optimizer.betas": [0.8, 0.9]}) == ["optimizer.betas"]
    assert warned(**{"optimizer.eps": 1e-6}) == ["optimizer.eps"]
    assert warned(**{"optimizer.name": "adamw", "optimizer.betas": [0.8, 0.9]}) == []
    adamw = {"optimizer.name": "adamw", "optimizer.momentum": 0.9}
    assert warned(**adamw) == ["optimizer.momentum"]
    assert warned(**{"schedule.min_lr": 0.1}) == ["schedule.min_lr"]
    assert warned(**{"schedule.min_lr": 0.09, "schedule.name": "linear"}) == []
    assert warned(**{"schedule.min_lr": 0.1, "schedule.name": "linear"}) == ["schedule.min_lr"]
    assert warned(**{"optimizer.options": {"a": 1}}) == ["optimizer.options"]
    assert warned(**{"schedule.options": {"a": 1}}) == ["schedule.options"]
    keys = {"optimizer.betas": [0.8, 0.9], "optimizer.momentum": 0.9, "optimizer.eps": 1e-6}
    own = {"optimizer.name": "torch.optim:Adam", "optimizer.options": {"eps": 1e-6}}
    assert warned(**own) == [] and sorted(warned(**own | keys)) == sorted(keys)
    keys = {"schedule.warmup_steps": 3, "schedule.min_lr": 0.1}
    own = {"schedule.name": "a.b:c", "schedule.options": {"d": 1}}
    assert warned(**own) == [] and sorted(warned(**own | keys)) == sorted(keys)
    assert warned(**{"strategy.ddp.powersgd_rank": 2}) == ["strategy.ddp.powersgd_rank"]
    rank = {"strategy.ddp.powersgd_rank": 2, "strategy.ddp.comm_hook": "powersgd"}
    assert warned(**rank) == []


def test_defaults_written_out_do_not_warn() -> None:
    assert load_job(to_dict(load_job(JOB))).warnings() == []


def test_lengths_become_steps() -> None:
    epochs = load_job(JOB | {"train": {"global_batch": 6, "epochs": 2}})
    resolved = resolve_lengths(epochs, 13)  # 3 batches an epoch, the last one smaller
    assert (resolved.train.steps, resolved.train.epochs) == (6, None)
    assert resolved.strategy.local_sgd.sync_every == 3
    assert epochs.train.epochs == 2, "the job itself stays as it was"
    exact = resolve_lengths(epochs, 12)
    assert (exact.train.steps, exact.strategy.local_sgd.sync_every) == (4, 2)
    steps = resolve_lengths(load_job(JOB, {"strategy.local_sgd.sync_every": 5}), 13)
    assert (steps.train.steps, steps.strategy.local_sgd.sync_every) == (3, 5)
    assert resolve_lengths(resolved, 13) == resolved
    assert load_job(to_dict(resolved)) == resolved


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_may_override_the_micro_batches(name: str) -> None:
    job = load_job(JOB, {"train.micro_batches": 2, f"strategy.{name}.micro_batches": 5})
    others = {other: job.micro_batches(other) for other in NAMES if other != name}
    assert job.micro_batches(name) == 5
    assert set(others.values()) == {2}
