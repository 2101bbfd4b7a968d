"""Targets are counted before they are loaded, and the batches of several steps loaded at once."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from hybrid.data import targets
from hybrid.data.batches import BatchPlan
from hybrid.data.loader import load_micro_batch
from hybrid.data.steps import AHEAD_STEPS, ALIGNMENT, StepLoader
from hybrid.data.targets import targets_per_sample
from hybrid.data.text import Blocks
from hybrid.data.text.cache import Side
from hybrid.engines.counting import TargetCounter
from hybrid.models import losses
from tests.test_loading import LABELS, Doubled, Together, drawn, samples


class Declared(Together):
    """Says how many targets a sample has."""

    targets_per_sample = 1


def blocks(num_tokens: int) -> Blocks:
    return Blocks(numpy.arange(num_tokens) % 50, 16, 50, Side(num_tokens, num_tokens, 1, ""))


ROWS_OF_3 = torch.arange(30).reshape(10, 3)
COUNTS: dict[str, tuple[Any, int | None]] = {
    "classes": (samples(), 1),
    "tokens": (TensorDataset(ROWS_OF_3, ROWS_OF_3), 3),
    "grids": (TensorDataset(ROWS_OF_3, ROWS_OF_3.reshape(10, 3, 1).expand(10, 3, 4)), 12),
    "whether": (TensorDataset(ROWS_OF_3, ROWS_OF_3 > 7), 3),
    "ignored input": (TensorDataset(ROWS_OF_3 - 100, ROWS_OF_3), 3),
    "ignored first": (TensorDataset(ROWS_OF_3, ROWS_OF_3 - 100), None),
    "ignored last": (TensorDataset(ROWS_OF_3, ROWS_OF_3 - 129), None),
    "numbers": (TensorDataset(ROWS_OF_3, ROWS_OF_3.float()), None),
    "three tensors": (TensorDataset(ROWS_OF_3, ROWS_OF_3, ROWS_OF_3), None),
    "derived": (Doubled(drawn(4), LABELS), None),
    "together": (Together(), None),
    "declared": (Declared(), 1),
    "a list": ([(1.0, 2)], None),
    "whole blocks": (blocks(16 * 3 + 1), 16),
    "a block filled up": (blocks(16 * 3 + 2), None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_targets_are_counted_before_they_are_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "ROWS", 4)  # several pieces
    sample_set, expected = COUNTS[name]
    loss = losses.cross_entropy
    assert targets_per_sample(sample_set, loss) == expected
    assert targets_per_sample(Subset(Subset(sample_set, [0]), [0]), loss) == expected
    if expected is not None:
        batch = load_micro_batch(sample_set, list(range(len(sample_set))))
        counted = TargetCounter(loss, torch.device("cpu")).count(batch)
        assert counted == expected * len(sample_set)


def test_the_target_that_does_not_count_is_one() -> None:
    assert targets.IGNORED_TARGET == losses.IGNORED_TARGET


@pytest.mark.parametrize("batch", [8, 7, 3])
@pytest.mark.parametrize("shares", [[0], [1], [0, 1]])
@pytest.mark.parametrize("size", [None, 2])
def test_steps_that_are_loaded_at_once_are_those_loaded_alone(
    batch: int, shares: list[int], size: int | None
) -> None:
    """Batches of 7 are not aligned, of 3 samples one micro-batch is empty, 50 do not divide."""
    inputs, targets = torch.randn(50, 16), torch.randint(3, (50,))
    samples, plan = TensorDataset(inputs, targets), BatchPlan(50, batch, 2, 2, 5)
    loader = StepLoader(plan, samples, shares, size, known=1)
    assert loader._steps > 1
    for step in [*range(70), 3, 200]:
        found = loader.step(step)
        ids = [i for share in shares for i in plan.micro_batch_ids(step, share)]
        assert [m.ids.tolist() for m in found] == ids
        for micro_batch in found:
            rows = micro_batch.ids.tolist()
            rows += [0] * ((size or 1) - len(rows))
            assert torch.equal(micro_batch.input, inputs[rows])
            assert torch.equal(micro_batch.target, targets[rows])
            assert micro_batch.input.data_ptr() % ALIGNMENT == 0
            assert micro_batch.num_targets == len(micro_batch.ids)


def test_a_pipeline_s_large_micro_batches_of_a_step_are_loaded_at_once() -> None:
    inputs, targets = torch.randn(40, 3008), torch.randint(3, (40,))
    plan = BatchPlan(40, 8, 1, 2, 0)
    loader = StepLoader(plan, TensorDataset(inputs, targets), [0], 4)
    for step in (0, 1, 7):
        first, second = loader.step(step)
        assert torch.equal(torch.cat([first.input, second.input]), inputs[plan.batch(step)])
        assert first.input.untyped_storage().data_ptr() == second.input.untyped_storage().data_ptr()


def test_a_layer_may_change_each_micro_batch_in_place() -> None:
    """Pipelines have several in flight when the first one's gradients are taken."""
    inputs, weight = torch.randn(8, 16), torch.ones(16, requires_grad=True)
    samples = TensorDataset(inputs, torch.zeros(8, dtype=torch.int64))
    first, second = StepLoader(BatchPlan(8, 8, 1, 2, None), samples, [0]).step(0)
    sums = [(part.input.mul_(weight) * weight).sum() for part in (first, second)]
    for loss in sums:
        loss.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * inputs.sum(0), rtol=0, atol=1e-5)


def test_large_rows_and_other_sets_are_loaded_step_by_step() -> None:
    large = TensorDataset(torch.randn(40, 3000), torch.zeros(40, dtype=torch.int64))
    plan = BatchPlan(40, 8, 1, 1, 0)
    assert StepLoader(plan, large, [0])._steps == 0
    assert StepLoader(plan, large, [0], inputs=False)._steps == AHEAD_STEPS
    assert StepLoader(plan, [(torch.zeros(2), 0)] * 40, [0])._steps == 0
    small = TensorDataset(torch.randn(40, 3), torch.zeros(40, dtype=torch.int64))
    assert StepLoader(plan, small, [0])._steps == AHEAD_STEPS
