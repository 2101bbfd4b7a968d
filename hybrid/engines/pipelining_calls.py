"""This module spares torch's pipelines calls that are for nothing, and gloo's threads a spin.

A pipeline of small steps waits where its last stage takes a moment longer than the first one's next
forward pass, and gloo's threads then spin for a lock: see benchmarks/LOG_PIPELINES.md."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import stage

from .backward import run_backward


class StageModule(nn.Module):
    """Is what torch takes for a stage's module: a function of a micro-batch's tensors.

    It has no parameters, since torch does nothing to them here. function: is called with this
    object first, and may put another function in its place."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *received: torch.Tensor) -> Any:
        """Call the function."""
        return self.function(self, *received)


def spare_calls(made: Any, first_gradient: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Spare a `PipelineStage` calls for nothing in each micro-batch.

    torch describes each output for a log that nobody writes, looks for tensors in a tuple of
    tensors as if that were any nesting, looks up the rank of a stage at each transfer, and
    describes again what it receives into the same memory. It begins each backward pass with ones:
    here it is with what `first_gradient` returns for a loss. test_workarounds_pipelining.py tells
    when it has ceased."""
    stage.map_debug_info = _Described  # type: ignore[assignment]
    stage.flatten_args = _flatten  # type: ignore[assignment]
    made._resolve_peer_global_rank = functools.cache(made._resolve_peer_global_rank)
    made.get_fwd_recv_ops = functools.cache(made.get_fwd_recv_ops)
    made.get_bwd_recv_ops = functools.cache(made.get_bwd_recv_ops)
    made.backward_maybe_with_nosync = functools.partial(_take_gradients, first_gradient)


class EarlyReceives:
    """Begins all that a stage receives in a step before its first micro-batch, over gloo.

    gloo has one connection to each rank of a group. A rank's own thread locks it to send, and to
    ask for a message, and gloo's thread spins where it finds it locked. So nothing is asked for
    while others send, and gradients go over a group of their own. Messages from one rank come in
    the order in which their receives began. With NCCL, receives would keep what is sent after them
    waiting. test_workarounds_pipelining.py tells when torch begins to receive earlier.

    made: the `PipelineStage`, whose methods this replaces. number: of its micro-batches. gradients:
    a group of all ranks, in the order of the stage's."""

    def __init__(self, made: Any, number: int, gradients: dist.ProcessGroup) -> None:
        self.number = number
        backward = functools.partial(_in_group, gradients, made.get_bwd_recv_ops)
        self.operations = made.get_fwd_recv_ops, backward
        self.begun: list[list[list[Any]]] = [[], []]  # forward, backward; by micro-batch
        made.get_fwd_recv_ops, made.get_bwd_recv_ops = self.begin, lambda chunk: []
        made.get_bwd_send_ops = functools.partial(_in_group, gradients, made.get_bwd_send_ops)
        made._retrieve_recv_activations = self._after(0, made._retrieve_recv_activations)
        made._retrieve_recv_grads = self._after(1, made._retrieve_recv_grads)

    def begin(self, chunk: int) -> list[Any]:
        """Begin them with micro-batch 0, and return what is left to begin: nothing."""
        if chunk == 0:
            every = range(self.number)
            self.begun = [[_begin(ops(i)) for i in every] for ops in self.operations]
        return []

    def _after(self, way: int, retrieve: Callable[[int], Any]) -> Callable[[int], Any]:
        """Return `retrieve` as it is once what it takes has come."""

        def wait_and_retrieve(chunk: int) -> Any:
            for work in self.begun[way][chunk]:
                work.wait()
            return retrieve(chunk)

        return wait_and_retrieve


def _begin(operations: list[Any]) -> list[Any]:
    return [op.op(op.tensor, op.peer, op.group, op.tag) for op in operations]


def _in_group(
    group: dist.ProcessGroup, operations: Callable[[int], list[Any]], chunk: int
) -> list[Any]:
    """Return a micro-batch's operations in another group, of the same ranks."""
    found = operations(chunk)
    for operation in found:
        operation.group = group
    return found


def forget_hooks(made: Any) -> None:
    """Remove the hooks that a layer has put on what it received.

    torch receives into the same tensors in each step, so that they would stay, and be called again
    and again (pytorch/pytorch#185331)."""
    for infos in made.args_recv_info.values():
        for info in infos:
            if info.buffer is not None and info.buffer._backward_hooks:
                info.buffer._backward_hooks = None


def _take_gradients(
    first_gradient: Callable[[torch.Tensor], torch.Tensor],
    kind: str,
    given: dict[str, Any],
    last_backward: bool = False,
) -> tuple[tuple[torch.Tensor | None, ...], None]:
    """Take the gradients of a stage's outputs, and return those of what it received."""
    output = given["stage_output"]
    if given["output_grads"] is None:  # it is the loss
        pairs = [(output, first_gradient(output))]
    else:
        pairs = list(zip(output, given["output_grads"], strict=True))
    pairs = [pair for pair in pairs if pair[0].requires_grad and pair[1] is not None]
    if pairs:
        run_backward([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    found = tuple([value.grad for value in given["input_values"]])
    for value in given["input_values"]:
        value.grad = None
    return found, None


class _Described:
    """Is the description of a value, made where somebody reads it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __str__(self) -> str:
        return str(_describe(self.value))


_describe, _flatten_any = stage.map_debug_info, stage.flatten_args


def _flatten(values: Any) -> list[Any]:
    """Return what is in a nesting, in order; a tuple of tensors, or an empty dict, has no other."""
    if type(values) is tuple and all([type(value) is torch.Tensor for value in values]):
        return list(values)
    found: list[Any] = _flatten_any(values) if values else []
    return found
