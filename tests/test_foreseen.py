"""What every rank would find is found once: targets, sizes, and settings that have no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset

import hybrid
from hybrid.engines import schedule
from hybrid.job.errors import JobError
from hybrid.job.schema import resolve_lengths
from hybrid.models.losses import cross_entropy
from hybrid.training.check import CheckedJob, check_job, look_at_job
from tests.conftest import small_job

WIDTH, CLASSES, SIZE = 7, 3, 45
OWN_DATA = "data.name = 'tests.test_foreseen:data'"


def inputs() -> torch.Tensor:
    return torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(1))


def classes(late: int | None = None) -> torch.Tensor:
    """One class a sample; a late sample has another one."""
    target = torch.arange(SIZE) % CLASSES
    if late is not None:
        target[31] = late
    return target


TARGETS: dict[str, Callable[[], Any]] = {
    "plain": classes,
    "beyond": lambda: classes() + 1,
    "late beyond": lambda: classes(CLASSES),
    "late huge": lambda: classes(10**12),
    "late negative": lambda: classes(-1),
    "late ignored": lambda: classes(-100),
    "floats": lambda: classes().float(),
    "doubles": lambda: classes().double(),
    "int32": lambda: classes().int(),
    "bytes": lambda: classes().to(torch.uint8),
    "truths": lambda: classes().bool(),
    "probabilities": lambda: functional.one_hot(classes(), CLASSES).float(),
}
FORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensors": lambda y: TensorDataset(inputs(), y),
    "list": lambda y: list(zip(inputs(), y, strict=True)),
    "numbers": lambda y: [(x, int(z)) for x, z in zip(inputs(), y, strict=True)],
    "subset": lambda y: Subset(TensorDataset(inputs(), y), list(range(SIZE - 1, 0, -1))),
}


def data(kind: str, form: str = "tensors", side: str = "train") -> Any:
    """Two sets, one of which has targets of some kind."""
    odd, plain = FORMS[form](TARGETS[kind]()), FORMS[form](classes())
    return (odd, plain) if side == "train" else (plain, odd)


def model(torchs: bool = False) -> Any:
    return [nn.Linear(WIDTH, CLASSES)], nn.CrossEntropyLoss() if torchs else cross_entropy


def make_job(**changes: Any) -> hybrid.Job:
    base = {
        "model": {"name": "tests.test_foreseen:model"},
        "data": {"name": "tests.test_foreseen:data", "options": {"kind": "plain"}},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"global_batch": 11, "micro_batches": 2, "steps": 7},
    }
    return hybrid.load_job(base, {key.replace("__", "."): v for key, v in changes.items()})


def refusal(**changes: Any) -> str:
    with pytest.raises(JobError) as refused:
        check_job(make_job(**changes))
    line = str(refused.value)
    assert "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize("torchs", [False, True])
@pytest.mark.parametrize(
    "kind, words",
    [
        ("beyond", "train sample 2 is 3"),
        ("late beyond", "train sample 31 is 3"),
        ("late huge", "train sample 31 is 1000000000000"),
        ("late negative", "train sample 31 is -1"),
    ],
)
def test_a_class_that_the_model_has_no_score_for(kind: str, words: str, torchs: bool) -> None:
    said = refusal(data__options={"kind": kind}, model__options={"torchs": torchs})
    assert said.startswith(OWN_DATA) and words in said
    assert said.endswith(
        "scores of 3 classes; valid: 0 to 2, or -100 for a target that does not count"
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["train", "test"])
def test_it_is_found_in_all_that_a_set_has_in_memory(form: str, side: str) -> None:
    said = refusal(data__options={"kind": "late beyond", "form": form, "side": side})
    i = SIZE - 1 - 31 if form == "subset" else 31
    assert f"{side} sample {i} is 3" in said


@pytest.mark.parametrize("kind", ["floats", "doubles", "truths", "int32"])
def test_a_target_that_is_no_class(kind: str) -> None:
    said = refusal(data__options={"kind": kind})
    assert said.startswith(f"{OWN_DATA}: targets are ") and said.endswith("valid: int64, 0 to 2")


@pytest.mark.parametrize("torchs", [False, True])
@pytest.mark.parametrize("kind", ["plain", "late ignored", "bytes", "probabilities"])
def test_targets_that_are_classes_are_let_through(kind: str, torchs: bool) -> None:
    check_job(make_job(data__options={"kind": kind}, model__options={"torchs": torchs}))


def test_torchs_own_loss_takes_other_integers() -> None:
    check_job(make_job(data__options={"kind": "int32"}, model__options={"torchs": True}))


BIG = {"name": "mlp", "options": {"sizes": [WIDTH, 6_000_000, CLASSES]}}


def test_a_model_too_large_to_be_tried_is_held_against_its_data() -> None:
    check_job(make_job(model=BIG))
    assert "train sample 31 is 3" in refusal(model=BIG, data__options={"kind": "late beyond"})
    wide = {"name": "mlp", "options": {"sizes": [WIDTH + 1, 6_000_000, CLASSES]}}
    said = refusal(model=wide)
    assert said.startswith("model.name = 'mlp': layer 0 cannot take a sample of data.name = ")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": {"name": "gpt", "options": {"preset": "1m", "num_layers": 10**9}}}, "10000"),
        ({"data": {"name": "random", "options": {"samples": 10**11}}}, "this host has"),
        ({"train__steps": None, "train__epochs": 9 * 10**18}, "train.epochs"),
        ({"train__global_batch": 10**12, "train__micro_batches": 60}, None),
    ],
    ids=["depth", "samples", "epochs", "batch"],
)
def test_huge_numbers_are_one_line_at_once(changes: dict[str, Any], words: str | None) -> None:
    given = {key: value for key, value in changes.items() if value is not None}
    if words:
        assert words in refusal(**given)
        return
    with pytest.raises(JobError, match=r"train.micro_batches = 60: .* valid: 1 to 45"):
        check_job(make_job(**given)).plan("single", 1)


def test_ranks_without_a_sample_are_refused_once_the_data_is_known() -> None:
    checked = check_job(make_job(train__global_batch=60))
    with pytest.raises(JobError, match=r"2 of 47 data-parallel ranks .ddp. can have no sample"):
        checked.plan("ddp", 47)
    _, warnings = checked.plan("ddp", 45)
    assert "45 of the 90 micro-batches of a step have no sample" in warnings[0]
    assert checked.plan("ddp", 4)[1] == []


def found(**changes: Any) -> list[str]:
    checked: CheckedJob = look_at_job(make_job(**changes))
    return [finding.text for finding in checked.findings]


@pytest.mark.parametrize(
    "key",
    [
        *("schedule.warmup_steps", "checkpoint.every", "train.eval_every", "log.every"),
        "strategy.local_sgd.sync_every",
        "train.global_batch",
    ],
)
def test_what_a_run_is_too_short_for_is_told(key: str) -> None:
    edge = SIZE if key == "train.global_batch" else 7
    assert found(**{key: edge}) == []
    (line,) = found(**{key: edge + 1})
    assert (line.startswith(f"{key} = {edge + 1}: ") and f"valid: 1 to {edge}" in line) or (
        f"valid: {edge} at most" in line
    )


def test_a_window_that_is_never_full_is_told() -> None:
    guard = {"spike_factor": 3.0, "window": 7}
    assert "guard.window = 7" in found(guard=guard)[0]
    assert found(guard=guard | {"window": 6}) == []


def test_an_epoch_between_averages_is_what_the_job_says() -> None:
    assert found(train__steps=2) == []
    assert resolve_lengths(make_job(), SIZE).strategy.local_sgd.sync_every == 5


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"schedule": {"name": "linear", "min_lr": 0.1}}, "schedule.min_lr = 0.1"),
        ({"schedule": {"name": "cosine", "min_lr": 0.2}}, "schedule.min_lr = 0.2"),
        ({"guard": {"max_in_a_row": 3}}, "guard.max_in_a_row"),
        ({"launch__trust_pickle": True}, "launch.trust_pickle"),
        ({"schedule": {"name": "cosine", "min_lr": 0.09}}, None),
        ({"guard": {"max_in_a_row": 3, "non_finite": "skip"}}, None),
    ],
)
def test_settings_whose_effect_another_takes_are_told(
    changes: dict[str, Any], key: str | None
) -> None:
    lines = small_job(**changes).warnings()
    assert [line[: len(key)] for line in lines] == [key] if key else lines == []


def ones(step: int) -> float:
    SEEN.append(step)
    return 1.0


SEEN: list[int] = []


def test_a_schedule_of_a_billion_steps_is_asked_of_some() -> None:
    job = small_job(train__steps=10**9, schedule={"name": "tests.test_foreseen:ones"})
    SEEN.clear()
    schedule.check_schedule(job)
    assert len(SEEN) < 3 * schedule.TRIED
    assert {0, schedule.TRIED - 1, 10**9 - 1} <= set(SEEN)
