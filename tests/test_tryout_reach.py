"""A try-out takes little and leaves modules as they were; what it does not meet is named later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import hybrid
from hybrid.job.errors import RunError
from hybrid.models.losses import cross_entropy
from hybrid.training.check import check_job, look_at_job
from tests.bad_data import DATA
from tests.tryout_jobs import make_job


def test_a_sample_that_is_met_later_is_named_in_its_step() -> None:
    data = {"name": "tests.test_tryout_reach:late"}
    with pytest.raises(RunError) as failed:
        hybrid.train(make_job(data=data, train__steps=4), "single")
    assert "the input of sample 41 of the train set is not finite" in str(failed.value)
    assert "lower optimizer.lr" not in str(failed.value)


def test_a_batch_without_a_target_that_counts_is_named() -> None:
    data = {"name": "tests.test_tryout_reach:ignored"}
    with pytest.raises(RunError, match=r"loss nan.*no target of this batch counts") as failed:
        hybrid.train(
            make_job(data=data, train__global_batch=1, train__micro_batches=1, train__steps=60),
            "single",
        )
    assert "lower optimizer.lr" not in str(failed.value)


def ignored() -> Any:
    """Sets of which one sample's target is left out of the loss."""
    train, test = DATA["plain"]()
    pairs = [(x, -100 if i == 41 else y) for i, (x, y) in enumerate(train)]
    return pairs, test


def late() -> Any:
    """A set that only gives its samples one by one, one of them not finite."""
    sets = DATA["plain"]()
    sets[0].x[41] = float("inf")
    return sets


def test_a_try_out_takes_few_samples_and_one_backward(monkeypatch: Any) -> None:
    rows, backwards = list[int](), list[int]()
    monkeypatch.setattr("tests.test_tryout_reach.NOTED", rows.append)
    whole = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda t, *a, **k: (backwards.append(1), whole(t, *a, **k))[1]
    )
    look_at_job(make_job(model={"name": "tests.test_tryout_reach:noting"}))
    assert sum(rows) <= 5 + 6 * 8 and len(backwards) == 1  # 5 find what the layers return


NOTED: Any = print


class Noting(nn.Linear):
    """A linear map that notes how many rows it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 16] to [batch, 4]."""
        NOTED(len(x))
        return super().forward(x)


def noting() -> Any:
    return [Noting(16, 4)], cross_entropy


def test_a_large_model_stays_without_values() -> None:
    model = {"name": "linear", "options": {"in_features": 16, "out_features": 4_000_000}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybrid.training.tryout.run._run", lambda *_: pytest.fail("it has values"))
        checked = check_job(make_job(model=model, data__options={"kind": "late nan"}))
    assert ["sample 31" in found.text for found in checked.findings] == [True]


def test_the_module_that_a_user_keeps_is_left_as_it_was() -> None:
    before = {n: t.clone() for n, t in KEPT.state_dict().items()}
    check_job(make_job(model={"name": "tests.test_tryout_reach:kept"}))
    assert all(torch.equal(t, before[n]) for n, t in KEPT.state_dict().items())
    assert all(p.grad is None for p in KEPT.parameters()) and KEPT.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in KEPT.modules())


KEPT = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))


def kept() -> Any:
    """Each time the same modules."""
    return [*KEPT], cross_entropy
