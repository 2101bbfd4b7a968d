"""Receipts are sentences that follow the evidence, and all that was recorded stands below them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hybrid import report
from hybrid.records import Receipt
from hybrid.report.receipts import tell_receipt
from tests.test_report import Page, break_run, make_comparison, make_parity, make_run

REPLICAS = {"replicas": 4, "parameters_per_replica": 1000}
FSDP: dict[str, Any] = {
    "dtensor_parameters": 8,
    "parameters": 8,
    "elements_total": 1000,
    "local_share": 0.25,
    "mesh": [2, 2],
    "reshard_after_forward": [True, False],
}
ZERO: dict[str, Any] = {
    "zero_stage": 1,
    "elements_total": 1000,
    "gradients_partitioned": False,
    "gradients_reduced": "each step",
    "parameter_elements_by_rank": [1000, 1000],
    "master_elements_by_rank": [500, 499],
}
STAGES: dict[str, Any] = {
    "stages": 2,
    "columns": 2,
    "zero_stage": 0,
    "ranks": [
        {"stage": 0, "column": 0, "layers": [0, 1, 2], "parameters": 600},
        {"stage": 0, "column": 1, "layers": [0, 1, 2], "parameters": 600},
        {"stage": 1, "column": 0, "layers": [3], "parameters": 1},
        {"stage": 1, "column": 1, "layers": [3], "parameters": 1},
    ],
}


@pytest.mark.parametrize(
    ("evidence", "told"),
    [
        (
            {"replicas": 1, "parameters_per_replica": 1000},
            "1 process held the whole model of 1,000 parameters.",
        ),
        (
            REPLICAS | {"merge_every": 1, "merges": 30},
            "4 processes held the whole model of 1,000 parameters each. Each stepped alone, and "
            "they averaged their parameters after every step, 30 times in all.",
        ),
        (
            {"model": "Any", "group_size": 4, "comm_hooks": ["bf16"], "bucket_bytes": 2**20},
            "A Any averaged the gradients of 4 processes by the hook bf16, in buckets of at most "
            "1.00 MiB.",
        ),
        (
            FSDP,
            "8 of 8 parameter tensors were DTensors on a mesh of 2 x 2; rank 0 held 25.0% of 1,000 "
            "elements; 1 of 2 units freed their parameters after the forward pass.",
        ),
        (
            ZERO,
            "DeepSpeed ran ZeRO stage 1: of 1,000 elements each rank held the optimizer's copy of "
            "499 to 500 and the parameters of 1,000; gradients were kept whole and reduced in each "
            "step.",
        ),
        (
            STAGES,
            "2 stages in 2 columns, with ZeRO stage 0: stage 0 held layers 0 to 2 (600 "
            "parameters), stage 1 held layer 3 (1 parameter).",
        ),
        ({"sample_digest_by_rank": ["a", "b"]}, "2 ranks read samples, all different."),
        (
            {"sample_digest_by_rank": ["a", "a", ""]},
            "2 ranks read samples, only 1 of them different.",
        ),
        ({"sample_digest_by_rank": ["", "a"]}, "1 rank read samples."),
        ({"compiled_graphs": 3}, "3 graphs compiled."),
        ({"of my own": 1}, ""),
    ],
)
def test_sentences_follow_the_evidence(evidence: dict[str, Any], told: str) -> None:
    assert " ".join(tell_receipt(evidence)) == told


@pytest.mark.parametrize("evidence", [REPLICAS, FSDP, ZERO, STAGES])
def test_a_missing_figure_tells_nothing(evidence: dict[str, Any]) -> None:
    """A strategy of one's own may record some of these keys, or others."""
    for left_out in evidence:
        some = {key: value for key, value in evidence.items() if key != left_out}
        assert all(isinstance(sentence, str) for sentence in tell_receipt(some))
        assert not tell_receipt(dict.fromkeys(evidence, object()))


def test_page_shows_sentences_and_all_that_was_recorded() -> None:
    evidence = ZERO | {"of my own": {"inner": "found"}}
    run = dataclasses.replace(make_run("zero1"), receipt=Receipt(True, evidence))
    page = Page(report.html(break_run(make_comparison("ddp"), run, make_parity()))).text
    assert "DeepSpeed ran ZeRO stage 1: of 1,000 elements" in page
    assert all(key in page for key in evidence) and "found" in page
    assert "DeepSpeed ran" not in report.markdown(make_comparison("ddp"))
