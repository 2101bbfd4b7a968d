"""DeepSpeed's flat tensors as pieces of parameters, on objects like its own; fp16's loss scale."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid.engines.deepspeed_config import check_saved
from hybrid.engines.deepspeed_scale import read_counts, read_loss_scale, set_counts, set_loss_scale
from hybrid.engines.deepspeed_state import (
    make_room_in_partitions,
    numbers_in_partitions,
    pieces_of_partitions,
    update_parameters,
)
from hybrid.engines.frozen import FrozenParts
from hybrid.engines.training_state import Copies
from hybrid.job.errors import JobError, Unsupported
from tests.conftest import small_job

STEP = torch.float32, ()


def _of(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def flat_optimizer(sizes: list[int], rank: int, ranks: int) -> Any:
    """What DeepSpeed has on one of some ranks, for parameters of these sizes."""
    align = 2 * ranks
    whole = torch.arange(float(-(-sum(sizes) // align) * align))
    split = whole.split([*sizes, len(whole) - sum(sizes)])[: len(sizes)]
    parameters = [torch.nn.Parameter(part) for part in split]
    flat = torch.nn.Parameter(whole.clone().chunk(ranks)[rank])
    return SimpleNamespace(
        bf16_groups=[parameters],
        bf16_groups_flat=[whole],
        fp32_groups_flat_partition=[flat],
        real_dp_process_group=[None],
        optimizer=torch.optim.AdamW([flat]),
    )


def flat_pieces(optimizer: Any) -> list[Any]:
    """The pieces of its parameters, by their numbers."""
    tensors = {str(i): p for i, p in enumerate(optimizer.bf16_groups[0])}
    return pieces_of_partitions(tensors, optimizer, Copies(), FrozenParts((), 0, 1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_the_parts_of_all_ranks_are_the_whole(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, taken = [5, 1, 101, 0, 2, 17], dict[str, list[float]]()
    for rank in range(ranks):
        monkeypatch.setattr("torch.distributed.get_rank", lambda group, rank=rank: rank)
        pieces = flat_pieces(flat_optimizer(sizes, rank, ranks))
        assert len(pieces) == len(sizes), "each rank has a piece of each tensor"
        for piece in pieces:
            assert not piece.tensor.numel() or piece.start == len(taken.get(piece.name, []))
            taken.setdefault(piece.name, []).extend(piece.tensor.tolist())
    assert [len(taken[str(i)]) for i in range(len(sizes))] == sizes
    assert list(itertools.chain.from_iterable(taken.values())) == list(range(sum(sizes)))


def test_one_step_count_for_all_parameters_that_are_stepped_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 1)
    optimizer = flat_optimizer([5, 9], 1, 2)
    state: Any = optimizer.optimizer.state[optimizer.fp32_groups_flat_partition[0]]
    state |= {"step": torch.tensor(0.0), "beats": 0}
    for key, live in (("step", lambda: state["step"].item()), ("beats", lambda: state["beats"])):
        first, second = (piece for piece in flat_pieces(optimizer) if piece.key == key)
        first.write(0, torch.tensor([4]))
        assert live() == 4 and first.shape == ()
        second.write(0, torch.tensor([4]))
        words = f"has {key} = 3 of 1 and 4 of 0; DeepSpeed keeps one for both"
        with pytest.raises(JobError, match=words):
            second.write(0, torch.tensor([3]))


class DeepSpeedCPUAdam(torch.optim.AdamW):
    """Stands in for DeepSpeed's AdamW of that name, the op of which is compiled at first use."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__(parameters)
        self.opt_id, self.steps, self.ds_opt_adam = 3, list[int](), self

    def adam_update(self, number: int, step: int, *rest: Any) -> None:
        """Note a step on no elements."""
        assert number == 3 and [t.numel() for t in rest[-4:]] == [0] * 4
        self.steps.append(step)


def test_the_optimizer_for_offloading_counts_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    optimizer = flat_optimizer([5, 9], 0, 1)
    flat = optimizer.fp32_groups_flat_partition[0]
    optimizer.optimizer = inner = DeepSpeedCPUAdam([flat])
    tensors = {str(i): p for i, p in enumerate(optimizer.bf16_groups[0])}
    shapes = {n: {"weight": _of(p), "exp_avg": _of(p), "step": STEP} for n, p in tensors.items()}
    make_room_in_partitions(tensors, optimizer, shapes, [])
    assert inner.state[flat]["step"] == 0 and inner.state[flat]["exp_avg"].shape == flat.shape
    assert numbers_in_partitions(optimizer) == []
    for piece in flat_pieces(optimizer):
        if piece.key == "step":
            assert piece.tensor.dtype == torch.float32, "as torch's AdamW has it"
            piece.write(0, torch.tensor([4.0]))
    assert inner.state[flat]["step"] == 4 and type(inner.state[flat]["step"]) is int
    optimizer.update_lp_params = lambda: None
    update_parameters(optimizer)
    assert inner.steps == [1, 2, 3, 4]


def test_frozen_parameters_take_what_was_loaded_for_their_parts() -> None:
    frozen = torch.nn.Parameter(torch.linspace(0.1, 0.7, 14).view(2, 7), requires_grad=False)
    cut = [FrozenParts([frozen], rank, 4).piece("x", frozen) for rank in range(4)]
    assert [(p.start, p.tensor.numel()) for p in cut] == [(0, 4), (4, 4), (8, 4), (12, 2)]
    assert torch.cat([p.tensor for p in cut]).view(2, 7).equal(frozen)
    parts = FrozenParts([frozen, torch.nn.Parameter(torch.ones(3))], 0, 1)
    assert list(parts.parts) == [frozen]
    frozen.data = frozen.data.bfloat16()
    value = torch.linspace(0.3, 0.9, 14)
    parts.piece("x", frozen).write(0, value)
    parts.round()
    assert frozen.dtype == torch.bfloat16 and frozen.equal(value.bfloat16().view(2, 7))
    assert parts.whole(frozen).equal(value.view(2, 7))
    parts.take({"x": frozen}, {"x": -value.view(2, 7)})
    assert parts.whole(frozen).equal(-value.view(2, 7))


def doubling(scaler: Any) -> int:
    """After how many good steps a loss scale doubles."""
    before, steps = scaler.cur_scale, 0
    while scaler.cur_scale == before:
        scaler.update_scale(False)
        steps += 1
    return steps


def test_the_loss_scale_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DeepSpeed exactly; under torch's scaler, which doubles where the good steps are 7."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
    draw = torch.Generator().manual_seed(3)

    def make() -> Any:
        return loss_scaler.DynamicLossScaler(2.0**16, 7, 1, 1, False)

    scaler, other = make(), make()
    for _ in range(200):
        scaler.update_scale(bool(torch.rand((), generator=draw) < 0.06))
        state, counts = read_loss_scale(scaler), read_counts(scaler)
        assert state and 0 <= state["good_steps"] < 7
        again, moved = make(), make()
        set_loss_scale(again, state)
        set_counts(again, counts)
        set_loss_scale(moved, state)
        left = doubling(again)
        assert read_loss_scale(moved) == state
        late = counts["cur_iter"] == counts["last_overflow_iter"] + 1  # an overflow just before
        assert doubling(moved) == left - late
        assert left - late == 7 - state["good_steps"]
        set_loss_scale(other, state)
        set_counts(other, counts)
        assert vars(other) == vars(scaler)
    assert read_loss_scale(loss_scaler.LossScaler()) is None


@pytest.mark.parametrize(
    ("stage", "keys", "words"),
    [
        (3, {"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device"),
        (3, {"offload_param": {"device": "nvme"}}, "offload_param.device"),
        (2, {"zenflow": {"topk_ratio": 0.1}}, "zenflow"),
        (3, {"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights"),
    ],
)
def test_state_that_deepspeed_keeps_apart_is_refused(
    stage: int, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage} | keys}))
    section = {f"strategy__zero{stage}": {"ds_config": str(file)}}
    check_saved(small_job(**section), f"zero{stage}")
    with pytest.raises(Unsupported, match=f"zero_optimization.{words}: a checkpoint cannot"):
        check_saved(small_job(**section, checkpoint__every=2), f"zero{stage}")
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    check_saved(small_job(**section, checkpoint__every=2), f"zero{stage}")
