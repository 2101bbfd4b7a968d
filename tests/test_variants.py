"""A variant is a strategy with other settings, checked as the strategy's own section is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hybrid
from hybrid import records
from hybrid.job.errors import JobError
from hybrid.job.file import load_job, make_proxy, to_dict
from hybrid.job.schema import Parallel
from hybrid.job.strategy_settings import Strategies
from hybrid.job.variants import DEGREES, STRATEGIES, resolve, warnings_of
from hybrid.layout import LayoutError
from hybrid.records import Record
from hybrid.strategies import registry
from hybrid.training.run import run_job
from tests.conftest import SMALL, small_job
from tests.test_settings import evidence

KEEP = {"strategy": "fsdp", "reshard_after_forward": False}


def refusal(**changes: Any) -> str:
    """What is wrong in the small job with these changes, in one line."""
    with pytest.raises(JobError) as error:
        small_job(**changes)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value).removeprefix("job: ")


def test_the_job_knows_every_strategy() -> None:
    assert registry.NAMES == STRATEGIES
    assert tuple(Parallel.model_fields) == DEGREES


def test_a_variant_is_its_strategy_with_other_settings() -> None:
    base = {"strategy__fsdp": {"micro_batches": 3}, "parallel": {"pp": 2, "shard": 1}}
    job = small_job(variant={"keep": KEEP | {"shard": 2}}, **base)
    choice = resolve(job, "keep")
    assert (choice.name, choice.strategy, choice.variant_of) == ("keep", "fsdp", "fsdp")
    fsdp = choice.job.strategy.fsdp
    assert (fsdp.micro_batches, fsdp.reshard_after_forward) == (3, False)
    assert (choice.job.parallel.pp, choice.job.parallel.shard) == (2, 2)
    assert choice.job.model == job.model and job.strategy.fsdp.reshard_after_forward
    assert resolve(choice.job, "fsdp").job == choice.job, "it is resolved once"
    plain = resolve(job, "fsdp")
    assert plain.job is job and plain.variant_of is None
    assert load_job(json.loads(json.dumps(to_dict(job)))) == job, "ranks read back the same"


def test_the_2d_section_is_found_by_its_name() -> None:
    job = small_job(variant={"flat": {"strategy": "2d", "zero_stage": 0, "pp": 2, "dp": 2}})
    choice = resolve(job, "flat")
    assert choice.job.strategy.two_d.zero_stage == 0
    assert choice.job.strategy.model_fields_set <= set(Strategies.model_fields)
    assert to_dict(choice.job)["strategy"]["2d"]["zero_stage"] == 0


def test_a_strategy_of_ones_own_has_variants_too() -> None:
    own = {"strategy": "tests.toy_strategy", "micro_batches": 4, "dp": 2}
    choice = resolve(small_job(variant={"toy": own}), "toy")
    assert choice.job.micro_batches(choice.strategy) == 4 and choice.job.parallel.dp == 2


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"fsdp": KEEP}, "variant.fsdp: cannot be a variant's name"),
        ({"a/b": KEEP}, "variant.a/b: cannot be a variant's name"),
        ({"..": KEEP}, "variant...: cannot be a variant's name"),
        ({"proxy": KEEP}, "variant.proxy: cannot be a variant's name"),
        ({"single_cut_3": KEEP}, "variant.single_cut_3: cannot be a variant's name"),
        ({"x_emulation": KEEP}, "variant.x_emulation: cannot be a variant's name"),
        ({"x": {}}, "variant.x.strategy: missing"),
        ({"x": 3}, "variant.x = 3: "),
        ({"x": {"strategy": "dpd"}}, "variant.x.strategy = 'dpd': unknown; valid: single, ddp"),
        ({"x": {"strategy": 3}}, "variant.x.strategy = 3: "),
        (
            {"x": {"strategy": "fsdp", "reshard_after": False}},
            "variant.x.reshard_after: unknown key; did you mean 'reshard_after_forward'? valid: ",
        ),
        (
            {"x": KEEP | {"reshard_after_forward": 0}},
            "variant.x.reshard_after_forward = 0: Input should be a valid boolean",
        ),
        ({"x": {"strategy": "ddp", "dp": 2}}, "variant.x.dp: has no effect under ddp; valid: "),
        ({"x": KEEP | {"pp": 2}}, "variant.x.pp: has no effect under fsdp; valid: strategy, rep"),
        ({"x": KEEP | {"shard": 0}}, "variant.x.shard = 0: "),
    ],
)
def test_a_wrong_variant_is_refused_by_its_field(variant: Any, words: str) -> None:
    assert refusal(variant=variant).startswith(words)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"strategy": "no.such"}, "variant.x: strategy = 'no.such': cannot be imported"),
        ({"strategy": "zero1", "ds_config": "nowhere.json"}, "variant.x: ds_config = 'nowhere"),
        (KEEP | {"shard": 3}, "variant.x: parallel.replicate x parallel.shard: ? x 3 is not 2"),
        ({"strategy": "pipeline", "partition": [9, 9]}, "variant.x: "),
    ],
)
def test_what_is_found_later_names_the_variant_too(
    variant: Any, words: str, tmp_path: Path
) -> None:
    with pytest.raises((JobError, LayoutError)) as error:
        hybrid.compare(small_job(variant={"x": variant}), ["x"], nproc=2, out=tmp_path / "out")
    assert str(error.value).startswith(words) and not (tmp_path / "out").exists()


def test_settings_without_effect_are_warned_of() -> None:
    job = small_job(variant={"rank": {"strategy": "ddp", "powersgd_rank": 2}, "keep": KEEP})
    (line,) = warnings_of(job, ["single", "rank", "keep"])
    assert line.startswith("variant.rank: strategy.ddp.powersgd_rank has no effect")
    assert warnings_of(job, ["ddp", "keep"]) == []


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        (3, "proxy = 3: "),
        ({"train": {"stpes": 3}}, "[proxy]: train.stpes: unknown key; did you mean 'steps'"),
        ({"train.steps": 0}, "[proxy]: train.steps = 0: "),
        ({"train.precision": "bf16"}, "proxy.train.precision: a proxy computes as the job does"),
        ({"optimizer": {"name": "adamw"}}, "proxy.optimizer.name: a proxy computes as"),
        ({"proxy": {"train.steps": 1}}, "proxy.proxy.train.steps: a proxy computes as"),
    ],
)
def test_a_wrong_proxy_is_refused_by_its_field(proxy: Any, words: str) -> None:
    assert refusal(proxy=proxy).startswith(words)


def test_a_proxy_is_the_job_with_overrides() -> None:
    small = {"model": {"options": {"sizes": [32, 10]}}, "train.epochs": 1}
    job = small_job(proxy=small, variant={"keep": KEEP})
    found = make_proxy(job)
    assert found is not None and found.proxy == {} and found.variant == job.variant
    assert found.model.options == {"sizes": [32, 10], "activation": "tanh"}
    assert (found.train.epochs, found.train.steps) == (1, None)
    assert job.model.options["sizes"] == SMALL["model"]["options"]["sizes"]
    assert make_proxy(small_job()) is None


def test_variants_run_beside_their_strategies(tmp_path: Path) -> None:
    variants = {
        "keep": KEEP,
        "rounded": {"strategy": "ddp", "comm_hook": "bf16", "micro_batches": 3},
        "rare": {"strategy": "local_sgd", "sync_every": 3},
        "grid": {"strategy": "2d", "zero_stage": 0},
    }
    job = small_job(variant=variants, strategy__local_sgd={"sync_every": 1})
    names = ["fsdp", "ddp", "local_sgd", *variants]
    result = hybrid.compare(job, names, nproc=2, out=tmp_path)
    runs, parity = result.strategies, result.parity
    assert result.ok, {n: (runs[n].reason, parity.get(n)) for n in runs}
    assert list(runs) == ["single", *names]
    assert {n: runs[n].variant_of for n in ("fsdp", "keep")} == {"fsdp": None, "keep": "fsdp"}
    assert runs["keep"].strategy == "keep"
    assert set(evidence(runs["fsdp"])["reshard_after_forward"]) == {True}
    assert set(evidence(runs["keep"])["reshard_after_forward"]) == {False}
    assert evidence(runs["rounded"])["comm_hooks"] and not evidence(runs["ddp"])["comm_hooks"]
    assert parity["rounded"].tolerance["loss"] > parity["ddp"].tolerance["loss"]
    assert runs["grid"].status == "not_possible" and "grid" not in parity
    assert runs["grid"].variant_of == "2d" and "need 4, 6, 8" in str(runs["grid"].reason)
    assert parity["rare"].reference == "rare_emulation"
    assert parity["local_sgd"].reference == "local_sgd_emulation"
    merges = {n: len(result.controls[f"{n}_emulation"].drift or ()) for n in ("rare", "local_sgd")}
    assert merges == {"rare": 2, "local_sgd": 6}, "the emulation has the variant's settings"
    left = records.read(Record, tmp_path / "keep" / "record.json")
    assert (left.strategy, left.variant_of) == ("keep", "fsdp")


def test_train_takes_a_variant(tmp_path: Path) -> None:
    job = small_job(variant={"keep": KEEP, "cut": {"strategy": "single", "micro_batches": 3}})
    record = run_job(job, "keep", tmp_path, nproc=2)
    assert record is not None and (record.strategy, record.variant_of) == ("keep", "fsdp")
    assert set(evidence(record)["reshard_after_forward"]) == {False}
    assert load_job(tmp_path / "job.json").variant.keys() == job.variant.keys(), "it runs again"
    alone = hybrid.train(job, "cut")
    assert (alone.strategy, alone.variant_of, alone.world_size) == ("cut", "single", 1)


def test_an_unknown_name_lists_the_variants_too() -> None:
    with pytest.raises(JobError, match=r"'kep': unknown; valid: single, .*package\.module, keep$"):
        registry.check_settings(small_job(variant={"keep": KEEP}), ["single", "kep"])
