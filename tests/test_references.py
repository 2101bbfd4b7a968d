"""What the runs of a comparison are held against: `single`, another run, or a proxy."""

from __future__ import annotations

from typing import Any

import pytest

from hybrid import records
from hybrid.job.errors import Failure, JobError, RunFailed
from hybrid.launch.failures import RankStatus, describe_out_of_memory, is_for_memory
from hybrid.launch.placement import find_placement
from hybrid.records import Comparison, Record
from hybrid.report import verdict
from hybrid.strategies import registry
from tests.conftest import small_job
from tests.launches import NAMES, PROXY, Launches, compare, launches, states, written

__all__ = ["launches"]  # a fixture


def no_memory() -> RunFailed:
    status = RankStatus(small_job(), find_placement())
    message = describe_out_of_memory(MemoryError(), status)
    return RunFailed(Failure(0, message, ""))


def test_without_names_all_strategies_and_variants_run(launches: Launches) -> None:
    job = small_job(variant={"keep": {"strategy": "fsdp"}})
    result = compare(launches, None, job)
    assert list(result.strategies) == [*registry.NAMES, "keep"]
    assert result.strategies["2d"].status == "not_possible"
    assert result.ok and result.reference == "single" and "keep" in launches.made


def test_another_reference(launches: Launches) -> None:
    result = compare(launches, reference="fsdp")
    assert list(result.strategies) == ["fsdp", "ddp", "zero1"] and result.ok
    assert result.reference == "fsdp"
    assert {parity.reference for parity in result.parity.values()} == {"fsdp"}


def test_controls_of_another_reference_are_runs_of_it(launches: Launches) -> None:
    launches.late["ddp"] = 2.001
    job = small_job(train__steps=30, variant={"keep": {"strategy": "fsdp", "micro_batches": 4}})
    result = compare(launches, job=job, reference="keep")
    assert states(result)["ddp"] == "not_equal" and states(result)["zero1"] == "equal"
    assert result.controls, "a late difference may be rounding"
    for label, run in result.controls.items():
        assert label.startswith(("keep_cut_", "keep_again")) and (run.strategy, run.world_size) == (
            "keep",
            2,
        )


@pytest.mark.parametrize("reference", ["local_sgd", "rounded"])
def test_what_computes_something_else_is_no_reference(reference: str, launches: Launches) -> None:
    job = small_job(variant={"rounded": {"strategy": "ddp", "comm_hook": "fp16"}})
    with pytest.raises(JobError, match=f"--reference '{reference}': does not compute what"):
        compare(launches, job=job, reference=reference)
    assert launches.made == []


@pytest.mark.parametrize("strategies", [NAMES, ["single", *NAMES]])
def test_a_reference_that_failed_leaves_nothing_compared(
    strategies: list[str], launches: Launches
) -> None:
    launches.ends["single"] = RunFailed(Failure(0, "the sky fell", ""))
    result = compare(launches, strategies)
    assert set(states(result).values()) == {"not_compared"} and not result.ok
    assert result.parity["ddp"].reason is not None
    assert "the reference single failed" in result.parity["ddp"].reason
    assert "the sky fell" in result.parity["ddp"].reason
    assert "differs" not in verdict(result).headline


def test_the_first_run_that_fits_takes_the_place_of_a_reference_that_does_not(
    launches: Launches,
) -> None:
    launches.ends["single"] = no_memory()
    result = compare(launches, ["local_sgd", *NAMES])
    assert result.reference == "ddp" and result.parity["fsdp"].reference == "ddp"
    assert result.strategies["single"].status == "not_possible" and "single" not in result.parity
    assert "out of memory" in str(result.strategies["single"].reason)
    assert result.ok and result.parity["local_sgd"].reference == "local_sgd_emulation"
    left = records.read(Record, launches.out / "single" / "record.json")
    assert left.status == "not_possible"


@pytest.mark.parametrize("asked", [{"strategies": ["single", "ddp"]}, {"reference": "single"}])
def test_a_reference_that_was_asked_for_by_name_is_not_replaced(
    asked: dict[str, Any], launches: Launches
) -> None:
    launches.ends["single"] = no_memory()
    result = compare(launches, **asked)
    assert result.reference == "single" and not result.ok
    assert result.strategies["single"].status == "failed"
    assert set(states(result).values()) == {"not_compared"}


def test_what_nobody_named_and_lacks_memory_as_single_does_is_not_possible(
    launches: Launches,
) -> None:
    """A variant is named by the job, as a strategy is by `--strategies`."""
    large = ("single", "ddp", "keep")
    launches.ends = {name: no_memory() for name in large}
    job = small_job(variant={"keep": {"strategy": "fsdp"}})
    result = compare(launches, None, job, reference="fsdp")
    statuses = {name: result.strategies[name].status for name in large}
    assert statuses == {"single": "not_possible", "ddp": "not_possible", "keep": "failed"}
    assert not result.ok and result.reference == "fsdp" and "ddp" not in result.parity
    assert records.read(Record, launches.out / "ddp" / "record.json").status == "not_possible"
    launches.ends = {"ddp": no_memory()}
    failed = compare(launches, None, reference="fsdp")
    assert failed.strategies["ddp"].status == "failed", "where single has room"
    launches.ends = {name: no_memory() for name in registry.NAMES}
    result = compare(launches, None, small_job(proxy=PROXY))
    assert not result.ok and states(result)["fsdp"] == "not_compared", "nothing ran"


def test_only_words_for_a_lack_of_memory_are_taken_for_it() -> None:
    assert is_for_memory(str(no_memory()))
    assert not is_for_memory("rank 0 on host: KeyError: 'out of memory' (in step 0)")


def test_a_proxy_proves_what_is_too_large_for_a_reference(launches: Launches) -> None:
    result = compare(launches, job=small_job(proxy=PROXY))
    small = [f"proxy/{name}" for name in ("single", *NAMES)]
    assert launches.made == [*small, *NAMES], "single does not run at the real size"
    assert result.reference == "proxy" and "single" not in result.strategies
    assert {p.reference for p in result.parity.values()} == {"proxy"} and result.ok
    assert len(result.strategies["ddp"].steps) == 6
    proved = records.read(Comparison, launches.out / "proxy" / "compare.json")
    assert proved.ok and len(proved.strategies["ddp"].steps) == 2
    said = verdict(written(launches))
    assert said.headline == "All 3 strategies equal at the proxy size." and said.ok


def test_what_the_proxy_does_not_prove_is_not_run(launches: Launches) -> None:
    launches.losses["proxy/fsdp"] = 3.0
    launches.ends["proxy/zero1"] = RunFailed(Failure(0, "the sky fell", "", "unsupported"))
    result = compare(launches, job=small_job(proxy=PROXY))
    assert states(result) == {"ddp": "equal", "fsdp": "not_equal"} and not result.ok
    assert "not run at the real size" in str(result.strategies["fsdp"].reason)
    assert result.parity["fsdp"].first_difference is not None
    zero1 = result.strategies["zero1"]
    assert (zero1.status, zero1.reason) == ("not_possible", "at the proxy size: the sky fell")
    assert not {"fsdp", "zero1"} & set(launches.made)


def test_a_run_that_leaves_the_others_at_the_real_size_is_not_excused_by_the_proxy(
    launches: Launches,
) -> None:
    launches.losses["fsdp"] = 3.0
    result = compare(launches, job=small_job(proxy=PROXY))
    assert states(result) == {"ddp": "equal", "fsdp": "not_equal", "zero1": "equal"}
    assert result.parity["fsdp"].reference == "ddp" and not result.ok


def test_a_run_that_fails_at_the_real_size_is_not_compared(launches: Launches) -> None:
    launches.ends["fsdp"] = RunFailed(Failure(0, "the sky fell", ""))
    result = compare(launches, job=small_job(proxy=PROXY))
    assert states(result)["fsdp"] == "not_compared" and not result.ok
    assert "the sky fell" in str(result.parity["fsdp"].reason)


@pytest.mark.parametrize("fits", [True, False])
def test_a_reference_that_was_asked_for_beside_a_proxy(fits: bool, launches: Launches) -> None:
    if not fits:
        launches.ends["single"] = no_memory()
    result = compare(launches, ["single", *NAMES], small_job(proxy=PROXY))
    assert result.ok and result.reference == ("single" if fits else "proxy")
    assert result.strategies["single"].status == ("ok" if fits else "not_possible")
    assert result.parity["ddp"].reference == result.reference
