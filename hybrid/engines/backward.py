"""This module takes the gradients of a micro-batch's loss, divided as the whole batch needs it."""

from collections.abc import Sequence

import torch
from torch.autograd.graph import _engine_run_backward

from .optimizer import LossScale


class Backward:
    """Adds the gradients of `factor * loss_sum`, without an operation for the product.

    Given such a first gradient, `Tensor.backward` compares its shape as if sizes could be symbols,
    which takes 18 us of CPU a call (benchmarks/LOG.md). The engine under it checks the shape again,
    so a plain tensor goes there at once. test_workarounds.py tells when torch has stopped doing
    so."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[float, torch.dtype], torch.Tensor] | None = None  # the last one

    def first(self, loss_sum: torch.Tensor, factor: float, scale: LossScale) -> torch.Tensor:
        """Return the gradient of `loss_sum` by itself, [], which the others follow from."""
        if self._kept is None or self._kept[0] != (factor, loss_sum.dtype):
            gradient = torch.full((), factor, dtype=loss_sum.dtype, device=loss_sum.device)
            self._kept = (factor, loss_sum.dtype), gradient
        return scale.scale(self._kept[1]) if scale.active else self._kept[1]

    def __call__(self, loss_sum: torch.Tensor, factor: float, scale: LossScale) -> None:
        """Take the gradients; `loss_sum`: [], with its graph. scale: what fp16 multiplies by."""
        gradient = self.first(loss_sum, factor, scale)
        if type(loss_sum) is not torch.Tensor:
            loss_sum.backward(gradient)
            return
        run_backward((loss_sum,), (gradient,))


def run_backward(tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
    """Add what follows from the gradients of plain tensors to those of the leaves behind them."""
    _engine_run_backward(
        tuple(tensors),
        tuple(gradients),
        False,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )
