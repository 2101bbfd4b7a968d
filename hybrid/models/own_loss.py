"""This module takes the loss that a module returns itself, as those of transformers do.

Such a loss is a mean over targets that the module chooses: all labels, or all but the first of each
row, without those that are ignored. Which they are is not guessed. The first evaluated micro-batch
shows it: there the module's own call of torch's loss is watched."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_leaves

from ..job.errors import JobError
from .loss_calls import LossCall
from .torch_losses import KINDS

MEND = "return (module, loss) with a loss (output, target) -> (sum, count)"
CUT_PROBLEM = f"the module returns its own loss, which needs all of it; for stages {MEND}"


def model_input(loss: Any, given: Any, target: Any) -> Any:
    """Returns what a model gets of a micro-batch: its input, and for its own loss the target too.

    To a dict the target is added as `labels`, or with its own names where it is a dict; to a tuple
    or a tensor it is added as the last of a tuple."""
    if not isinstance(loss, OwnLoss):
        return given
    if isinstance(given, Mapping):
        return {**given, **(target if isinstance(target, Mapping) else {"labels": target})}
    return (*(given if isinstance(given, (tuple, list)) else (given,)), target)


class OwnLoss:
    """Turns the mean that a module returns into a sum and a count.

    The mean is the only tensor of one floating number in what the module returns, by itself, in a
    tuple, or in a dict such as transformers' outputs. count: None until `learn` has seen a call."""

    ignored = None

    def __init__(self) -> None:
        self.count: Callable[[Any], int] | None = None

    def __repr__(self) -> str:
        return "the module's own loss"

    def __call__(self, output: Any, target: Any) -> tuple[torch.Tensor, int]:
        if self.count is None:
            raise JobError(f"it is not known what {self} counts; {MEND}")
        count = self.count(target)
        if count:
            return find_mean(output) * count, count
        # Its mean is NaN, and so would be the gradients.
        others = [t for t in tree_leaves(output) if _is_floating(t) and t.dim()]
        if not others:
            raise JobError(f"{self}: a micro-batch has no target that counts; {MEND}")
        return sum(t.nan_to_num(0.0, 0.0, 0.0).sum() * 0.0 for t in others), 0

    def learn(self, calls: Sequence[LossCall], output: Any, target: Any) -> None:
        """Finds how the module counts, from its one call of torch's loss in a forward pass.

        A micro-batch without a target that counts shows nothing. Raises JobError where the module
        calls none or several, or where what it returns is not that call's mean."""
        if self.count is not None:
            return
        if len(calls) != 1 or calls[0].arguments.get("reduction", "mean") != "mean":
            many = f"{len(calls)} of torch's losses" if len(calls) != 1 else "a loss of torch's"
            words = "it calls one of torch's losses once, with reduction 'mean'"
            raise JobError(f"{self}: its count is known where {words}; it calls {many}; {MEND}")
        call = calls[0]
        labels = next((t for t in tree_leaves(target) if isinstance(t, torch.Tensor)), None)
        if labels is None or call.arguments.get("weight") is not None:
            raise JobError(f"{self}: weighted, or without labels; {MEND}")
        mean = find_mean(output).detach()
        if not torch.isfinite(call.value) or not call.value:
            return
        if not torch.equal(mean.to(call.value.dtype), call.value):
            words = "is not the mean that it calls torch for (it adds something)"
            raise JobError(f"{self}: what the module returns as its loss {words}; {MEND}")
        self.count = _find_rule(call, labels)


def find_mean(output: Any) -> torch.Tensor:
    """Returns the only tensor of one floating number in an output; JobError if there are others."""
    named = output.get("loss") if isinstance(output, Mapping) else None
    found = [named] if named is not None else tree_leaves(output)
    means = [t for t in found if _is_floating(t) and t.dim() == 0]
    if len(means) != 1:
        raise JobError(
            f"the model gives no loss, and its module returns {len(means)} tensors of one number, "
            f"not one; {MEND}"
        )
    return means[0]


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _find_rule(call: LossCall, labels: torch.Tensor) -> Callable[[Any], int]:
    """Returns how targets are counted in a call of torch's loss for these labels."""
    aim = call.arguments["target"].flatten().to(labels.device)
    kind = KINDS[call.name].counts
    if kind == "elements" and aim.numel() == labels.numel():
        return lambda target: _labels(target).numel()
    if kind == "classes" and not labels.is_floating_point():
        ignored = int(call.arguments["ignore_index"])
        for cut in (_all, _next, _next_padded):
            if torch.equal(cut(labels, ignored).flatten(), aim):
                return lambda target: int((cut(_labels(target), ignored) != ignored).sum())
    raise JobError(f"the module's own loss: it is not known which labels it counts; {MEND}")


def _labels(target: Any) -> torch.Tensor:
    return next(t for t in tree_leaves(target) if isinstance(t, torch.Tensor))


def _all(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    return labels


def _next(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Returns each label's successor, as a model that predicts the next token is asked for."""
    return labels[..., 1:] if labels.dim() > 1 else labels[:0]


def _next_padded(labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """Returns the same with an ignored one at each row's end, as transformers does it."""
    return pad(_next(labels, ignored), (0, 1), value=ignored) if labels.dim() > 1 else labels[:0]
