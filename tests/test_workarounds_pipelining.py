"""Each work-around of torch's pipelines is still needed: when a test fails here, it can go."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import torch
from torch.distributed.pipelining import schedules, stage

from hybrid.engines.pipelining_calls import EarlyReceives

# A pipeline of one stage, whose batch norm counts passes, and whose second step raises.
PIPELINE = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
norm = nn.BatchNorm1d(3)
schedule = Schedule1F1B(PipelineStage(norm, 0, 1, torch.device("cpu")), 1, lambda x, _: x.sum())
rows = torch.randn(4, 3)
schedule.step(rows, target=rows)
passes = int(norm.num_batches_tracked)
def raises(*_):
    raise ValueError("planted")
norm.forward = raises
try:
    schedule.step(rows, target=rows)
except Exception as error:
    print(passes, type(error).__name__, repr(error.__cause__))
"""


def test_torch_s_pipelines_still_run_a_trial_pass_and_raise_errors_of_their_own() -> None:
    """hybrid/engines/pipeline_torch.py::TorchStage._try and _run"""
    command = [sys.executable, "-c", PIPELINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 RuntimeError ValueError('planted')\n", done.stdout + done.stderr


def test_torch_s_pipelines_still_receive_a_gradient_as_one_of_a_trial_pass_lies() -> None:
    """hybrid/engines/pipeline_torch.py::TorchStage._try, its hooks"""
    gradient = torch.randn(4, 14)[:, 5:]
    made = stage._make_tensor_from_meta(stage.extract_tensor_meta(gradient), torch.device("cpu"))
    assert made.shape == (4, 9) and not made.is_contiguous()


def test_torch_s_pipelines_still_receive_into_the_same_tensors() -> None:
    """hybrid/engines/pipelining_calls.py::forget_hooks"""
    given = inspect.getsource(stage._PipelineStageBase._retrieve_recv_activations)
    assert "activation = info.buffer.requires_grad_(" in given


def test_torch_s_pipelines_still_do_in_each_micro_batch_what_is_left_out() -> None:
    """hybrid/engines/pipelining_calls.py::spare_calls"""
    base = stage._PipelineStageBase
    forward = inspect.getsource(base.forward_one_chunk)
    assert "map_debug_info(output)" in forward and forward.count("flatten_args(") == 2
    for function in (base._resolve_peer_global_rank, base._get_recv_ops):
        assert "cache" not in inspect.getsource(function)
    assert "torch.autograd.backward(" in inspect.getsource(stage.stage_backward)
    steps = inspect.getsource(schedules.Schedule1F1B._step_microbatches)
    assert "_wait_batch_p2p(_batch_p2p(fwd_recvs" in steps  # it begins to receive when it waits


def test_a_stage_begins_all_receives_of_a_step_and_waits_for_each_when_it_is_needed() -> None:
    """hybrid/engines/pipelining_calls.py::EarlyReceives"""
    made, group = _Stage(), "group of gradients"
    EarlyReceives(made, 3, group)  # type: ignore[arg-type]
    for _ in range(2):
        for chunk in range(3):
            assert made.get_fwd_recv_ops(chunk) == made.get_bwd_recv_ops(chunk) == []
        made._retrieve_recv_activations(1)
        made._retrieve_recv_grads(2)
        begun = ["f0 stage's", "f1 stage's", "f2 stage's", *[f"b{i} {group}" for i in range(3)]]
        assert made.done == [*begun, "wait f1", "take f1", "wait b2", "take b2"]
        made.done.clear()
    assert [op.group for op in made.get_bwd_send_ops(1)] == [group]


class _Stage:
    """Stands for a `PipelineStage` that receives one tensor for each pass of a micro-batch."""

    def __init__(self) -> None:
        self.done = list[str]()

    def get_fwd_recv_ops(self, chunk: int) -> list[Any]:
        return [_Operation(self.done, f"f{chunk}")]

    def get_bwd_recv_ops(self, chunk: int) -> list[Any]:
        return [_Operation(self.done, f"b{chunk}")]

    def get_bwd_send_ops(self, chunk: int) -> list[Any]:
        return [_Operation(self.done, f"sent {chunk}")]

    def _retrieve_recv_activations(self, chunk: int) -> None:
        self.done.append(f"take f{chunk}")

    def _retrieve_recv_grads(self, chunk: int) -> None:
        self.done.append(f"take b{chunk}")


class _Operation:
    """Stands for a `P2POp`, and for what it begins."""

    tensor = peer = tag = None
    group = "stage's"

    def __init__(self, done: list[str], name: str) -> None:
        self.done, self.name = done, name

    def op(self, tensor: None, peer: None, group: str, tag: None) -> _Operation:
        self.done.append(f"{self.name} {group}")
        return self

    def wait(self) -> None:
        self.done.append(f"wait {self.name}")
