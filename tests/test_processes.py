"""What runs in one process leave to whatever that process does next."""

from __future__ import annotations

import os

import pytest

import hybrid
import hybrid.training.loop  # whose imports set variables of their own
from hybrid.launch.process_group import cleanup
from hybrid.models.mlp import mlp
from tests.conftest import SMALL, small_job


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_a_run_leaves_the_environment_as_it_was(strategy: str) -> None:
    before = dict(os.environ)
    hybrid.train(small_job(train__steps=1), strategy)
    assert os.environ == before  # else commands started from here would take RANK for a launcher's


def test_a_deepspeed_run_makes_no_later_run_one() -> None:
    losses = [
        [step.loss for step in hybrid.train(small_job(train__steps=2), strategy).steps]
        for strategy in ("zero1", "ddp", "zero1")
    ]
    assert losses[0] == losses[2] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.usefixtures("without_tryout")
def test_a_run_that_fails_leaves_it_too() -> None:
    before = dict(os.environ)
    with pytest.raises(IndexError, match="Target"):  # ten classes, four outputs
        hybrid.train(small_job(model__options={"sizes": [32, 4]}), "single")
    assert os.environ == before


def test_an_engine_of_one_s_own_loop_leaves_it_with_the_group() -> None:
    before = dict(os.environ)
    engine = hybrid.open_engine(small_job(), "zero1", *mlp(**SMALL["model"]["options"]))
    engine.close()
    assert "RANK" in os.environ
    cleanup()
    assert os.environ == before
