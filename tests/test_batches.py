"""Which samples a step sees depends on its seed alone, and the tally counts just these."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from hybrid.data import batches
from hybrid.data.batches import BLOCK, BatchPlan
from hybrid.data.loader import MicroBatch
from hybrid.data.permutation import permute
from hybrid.engines.hashes import hash_each, hash_ids
from hybrid.engines.tally import Tally, TallyRow
from hybrid.models.losses import cross_entropy

SHARES = [1, 2, 3, 4]


def flatten(pieces: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(pieces))


def used(plan: BatchPlan, step: int) -> list[int]:
    """What all shares together take at a step, in their order."""
    return flatten([flatten(plan.micro_batch_ids(step, s)) for s in range(plan.shares)])


@pytest.fixture
def permuted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the parts of an order that are computed from here on."""
    lengths: list[int] = []

    def noted(positions: range, *order: int) -> numpy.ndarray:
        lengths.append(len(positions))
        return permute(positions, *order)

    batches._block.cache_clear()
    monkeypatch.setattr(batches, "permute", noted)
    return lengths


def test_a_plan_is_a_pure_function_of_seed_step_and_share() -> None:
    plan = BatchPlan(50, 8, 3, 2, seed=4)
    places = [(step, share) for step in range(20) for share in range(3)]
    once = {place: plan.micro_batch_ids(*place) for place in places}
    torch.manual_seed(99)
    batches._block.cache_clear()
    again = BatchPlan(50, 8, 3, 2, seed=4)
    for place in reversed(places):
        BatchPlan(50, 8, 3, 2, seed=5).batch(place[0])  # another plan between two calls
        assert again.micro_batch_ids(*place) == once[place]


def test_asking_for_a_batch_leaves_torch_and_the_plan_alone() -> None:
    before = torch.get_rng_state()
    plan = BatchPlan(30, 7, 1, 1, seed=0)
    first = plan.batch(0)
    expected = list(first)
    first.clear()
    assert plan.batch(0) == expected
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(("total", "batch"), [(24, 8), (100, 24), (37, 10), (5, 7), (13, 1)])
def test_each_sample_is_used_once_an_epoch(shares: int, total: int, batch: int) -> None:
    for micro_batches in (1, 2, 5):
        plan = BatchPlan(total, batch, shares, micro_batches, seed=1)
        per_epoch = plan.steps_per_epoch
        assert (per_epoch - 1) * batch < total <= per_epoch * batch
        for epoch in range(3):
            steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
            assert sorted(flatten([used(plan, s) for s in steps])) == list(range(total))


@pytest.mark.parametrize("seed", [0, None])
def test_the_global_batch_depends_on_no_layout(seed: int | None) -> None:
    alone = BatchPlan(37, 10, 1, 1, seed)
    for shares, micro_batches in itertools.product(SHARES, (1, 2, 3, 11)):
        plan = BatchPlan(37, 10, shares, micro_batches, seed)
        for step in range(9):
            assert plan.batch(step) == alone.batch(step) == used(plan, step)


def test_shares_and_micro_batches_differ_by_at_most_one_sample() -> None:
    plan = BatchPlan(100, 23, 4, 3, seed=0)
    for step in range(5):
        shares = [plan.micro_batch_ids(step, s) for s in range(4)]
        sizes = [len(flatten(s)) for s in shares]
        assert max(sizes) - min(sizes) <= 1
        for share in shares:
            pieces = [len(p) for p in share]
            assert len(pieces) == 3 and max(pieces) - min(pieces) <= 1


def test_a_share_smaller_than_its_micro_batches_has_empty_ones() -> None:
    plan = BatchPlan(2, 2, 2, 2, seed=None)
    assert plan.micro_batch_ids(0, 0) == [[0], []]
    assert plan.micro_batch_ids(0, 1) == [[1], []]
    assert BatchPlan(1, 1, 2, 2, seed=None).micro_batch_ids(0, 1) == [[], []]


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = {
        (seed, epoch): tuple(BatchPlan(40, 40, 1, 1, seed).batch(epoch))
        for seed in (0, 1, 2, 2**63 - 1)
        for epoch in range(4)
    }
    assert len(set(orders.values())) == len(orders)
    assert tuple(range(40)) not in orders.values()


def test_seeds_alike_in_their_low_32_bits_have_orders_of_their_own() -> None:
    seeds = (0, 2**32, 2**62, 3 * 2**32)  # torch's CPU generator looks at 32 bits of a seed
    assert len({tuple(BatchPlan(40, 40, 1, 1, seed).batch(0)) for seed in seeds}) == len(seeds)


def test_no_seed_keeps_the_order_of_the_set() -> None:
    plan = BatchPlan(10, 4, 2, 1, seed=None)
    ids = [plan.batch(step) for step in range(6)]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] * 2
    assert plan.micro_batch_ids(0, 1) == [[2, 3]]


@pytest.mark.parametrize("seed", [0, None])
def test_the_size_of_a_batch_is_known_without_its_ids(
    seed: int | None, permuted: list[int]
) -> None:
    plan = BatchPlan(37, 10, 2, 1, seed)
    sizes = [plan.batch_size(step) for step in range(9)]
    assert sizes == [10, 10, 10, 7, 10, 10, 10, 7, 10] and not permuted
    assert sizes == [len(plan.batch(step)) for step in range(9)]


@pytest.mark.parametrize("batch", [1, 7, 300, 3000, BLOCK - 1, BLOCK, BLOCK + 1, 9000, 10_000])
def test_an_epoch_is_the_permutation_however_it_is_cut(batch: int) -> None:
    plan = BatchPlan(9_500, batch, 3, 2, seed=6)
    for epoch in (0, 5):
        order = permute(range(9_500), 9_500, 6, epoch).tolist()
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert flatten([plan.batch(step) for step in steps]) == order
        # From the last step and share to the first, so that no block is asked for in its turn.
        places = [(step, share) for step in reversed(steps) for share in (2, 1, 0)]
        pieces = [flatten(plan.micro_batch_ids(*place)) for place in places]
        assert flatten(pieces[::-1]) == order


def test_an_order_is_computed_in_blocks_of_bounded_size(permuted: list[int]) -> None:
    plan = BatchPlan(10**12, 100, 2, 2, seed=0)
    for step in range(200):
        plan.batch(step)
        for share in range(2):
            plan.micro_batch_ids(step, share)
    assert len(permuted) == 5 and max(permuted) <= BLOCK
    assert batches._block.cache_info().maxsize == 2


def test_a_share_of_a_large_batch_is_computed_alone(permuted: list[int]) -> None:
    plan = BatchPlan(10**9, 100_000, 1000, 4, seed=0)
    ids = plan.micro_batch_ids(7, 999)
    assert permuted == [100] and [len(piece) for piece in ids] == [25] * 4
    assert flatten(ids) == plan.batch(7)[-100:]
    assert BatchPlan(3, BLOCK, 5, 1, seed=0).micro_batch_ids(0, 4) == [[]]


def micro_batch(ids: list[int], padding: int = 0) -> tuple[torch.Tensor, MicroBatch]:
    """Logits and micro-batch of samples whose values depend on their id alone, then padding."""
    rows = [*ids, *([0] * padding)]
    output = torch.tensor([[math.sin(i), math.cos(i), 0.1 * i] for i in rows])
    target = torch.tensor([i % 3 for i in rows], dtype=torch.int64)
    return output.requires_grad_(), MicroBatch(output, target, torch.tensor(ids).long())


def tally(*pieces: list[int], padding: int = 0) -> TallyRow:
    sums = Tally(torch.device("cpu"))
    for ids in pieces:
        sums.add(cross_entropy, *micro_batch(ids, padding), score=True)
    return sums.row()


def test_padding_is_never_counted() -> None:
    assert tally([1, 2, 5], padding=4) == tally([1, 2, 5])
    output, piece = micro_batch([1, 2], padding=3)
    Tally(torch.device("cpu")).add(cross_entropy, output, piece).backward()
    assert output.grad is not None
    assert bool(output.grad[:2].any()) and not bool(output.grad[2:].any())


def test_a_loss_that_is_a_part_of_a_tensor_does_not_keep_the_rest_in_memory() -> None:
    sums = Tally(torch.device("cpu"))

    def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
        return (output * 2.0).flatten()[0], 2

    sums.add(loss, *micro_batch([1, 2]))
    assert sums.loss_sum is not None and sums.loss_sum.untyped_storage().nbytes() == 8
    assert float(sums.loss_sum) == pytest.approx(2 * math.sin(1))


def test_padding_alone_gives_a_zero_with_a_graph() -> None:
    sums = Tally(torch.device("cpu"))
    output, piece = micro_batch([], padding=2)
    loss = sums.add(cross_entropy, output, piece, score=True)
    loss.backward()
    assert float(loss.detach()) == 0 and output.grad is not None and not output.grad.any()
    assert sums.row() == (0.0, 0, 0, 0, 0, 0, 0, 0, 0.0, 1)


def test_digests_know_no_order_and_no_split() -> None:
    whole = tally([1, 2, 5, 9])
    for pieces in ([[9, 1, 5, 2]], [[1, 2], [5, 9]], [[5], [9, 2, 1], []]):
        other = tally(*pieces, padding=1)
        assert other[0] == pytest.approx(whole[0]) and other[1:8] == whole[1:8]
    assert whole[1:3] == (4, 4) and whole[6] == 1
    parts = [tally([1, 2]), tally([5, 9])]
    assert [sum(int(p[i]) for p in parts) % 2**64 for i in (3, 5)] == [whole[3], whole[5]]


def test_another_id_has_another_digest() -> None:
    digests = {hash_ids(torch.tensor([1, 2, i])) for i in range(1000)}
    assert len(digests) == 1000
    assert tally([1, 2, 2])[3] != tally([1, 2])[3] and tally([0])[3] != 0
    assert hash_ids(torch.tensor([1, 4])) != hash_ids(torch.tensor([2, 3]))


def test_samples_hashed_together_have_the_digests_that_each_has() -> None:
    parts = [torch.tensor(ids, dtype=torch.int64) for ids in ([3, 1, 2**40], [], [7], [], [0] * 9)]
    assert hash_each(parts) == [hash_ids(part) for part in parts]
    assert hash_each(parts)[0] > 2**53, "no digest is rounded"
