"""This module gives losses as (sum, count), which makes means over unequal shares exact.

A loss is a function `(output, target) -> (sum, count)`. Two attributes of it are optional:

- `count(target)`: what the loss will count of a target, known without an output. Engines divide by
  the count of the whole batch before the backward pass. A loss without it is asked with zeros of
  the output's shape.
- `ignored`: the only integer target that does not count where each other counts one. Then the data
  can tell the count before any sample is loaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..data.targets import IGNORED_TARGET
from ..job.errors import JobError
from .loss_calls import LossCall, LossCalls, unseen
from .own_loss import OwnLoss
from .torch_losses import KINDS, TorchLoss, as_torch_loss

Count = torch.Tensor | int | float
Loss = Callable[[Any, Any], tuple[torch.Tensor, Any]]
RETURN = "(sum, count), the sum over the micro-batch's targets and how many they are"


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the cross-entropy in nats, summed over targets other than -100, and their count.

    `output`: logits [..., classes] of any dtype. `target`: int64 [...]. The sum is in fp32."""
    logits, classes = output.float(), target
    if output.dim() > 2:
        logits, classes = logits.reshape(-1, output.shape[-1]), target.reshape(-1)
    total = functional.cross_entropy(logits, classes, ignore_index=IGNORED_TARGET, reduction="sum")
    return total, count_classes(target)


def count_classes(target: torch.Tensor) -> torch.Tensor:
    """Counts the targets other than -100, as a tensor []."""
    return torch.count_nonzero(target != IGNORED_TARGET)


cross_entropy.count = count_classes  # type: ignore[attr-defined]
cross_entropy.ignored = IGNORED_TARGET  # type: ignore[attr-defined]


def as_loss(given: Any) -> Loss:
    """Returns what a model function gave as its loss as a function of (output, target).

    given: such a function, or one that returns the mean that it calls torch for; one of torch's
    loss modules or functions, with `reduction` mean or sum, which come to the same, since the mean
    is always taken over the whole batch; or None for a module that returns its own loss. Raises
    ValueError in one line where it is none of these, or has parameters of its own, which no
    optimizer would train."""
    if given is None:
        return OwnLoss()
    if isinstance(given, type):
        raise ValueError(f"the loss is the class {given.__name__}, not an object of it")
    if not callable(given):
        raise ValueError(f"the loss is a {type(given).__name__}, not a function")
    module = given if isinstance(given, nn.Module) else getattr(given, "__self__", None)
    if isinstance(module, nn.Module):
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        if names:
            raise ValueError(
                f"the loss has parameters of its own ({', '.join(names)}), which no optimizer of "
                "the job trains: put them into a layer, whose output hands them to the loss"
            )
    ready = find_count(given) or isinstance(given, (GivenLoss, OwnLoss))
    return as_torch_loss(given) or (given if ready else GivenLoss(given))


class GivenLoss:
    """Calls a function of the user's, which may also return the mean of one loss of torch's.

    Such a mean is known by watching the function's calls of torch: the sum and the count are then
    taken of the same tensors. function: what the model function gave."""

    ignored = None

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function
        self._watches = True  # until it has returned a pair

    def __repr__(self) -> str:
        return repr(self.function)

    def __call__(self, output: Any, target: Any) -> Any:
        if not self._watches:
            return self.function(output, target)
        with LossCalls() as watched:
            given = self.function(output, target)
        if isinstance(given, torch.Tensor) and given.dim() == 0:
            return sum_of_mean(watched.calls, given) or given
        self._watches = False
        return given


def sum_of_mean(
    calls: Sequence[LossCall], mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | int] | None:
    """Returns the sum and the count of a mean that is the result of the only call; else None."""
    if len(calls) != 1 or calls[0].arguments["reduction"] not in ("mean", "batchmean"):
        return None
    (call,) = calls
    kind, given = KINDS[call.name], call.arguments
    unchanged = torch.equal(call.value.nan_to_num(), mean.detach().nan_to_num())
    if kind.outputs != 1 or call.result is not mean or not unchanged:
        return None
    options = {key: given[key] for key in kind.options}
    with unseen():
        loss = TorchLoss(call.name, options, given["reduction"])
        return loss(given["input"], given["target"])


def find_count(loss: Loss) -> Callable[[Any], Any] | None:
    """Returns the loss's own `count(target)`; None where it has none."""
    found = getattr(loss, "count", None)
    return found if callable(found) else None


def take_loss(loss: Loss, output: Any, target: Any) -> tuple[torch.Tensor, Count]:
    """Calls a loss; raises JobError, which says what to return, where it gives anything else."""
    given = loss(output, target)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise JobError(f"the loss returned {_describe(given)}; it must return {RETURN}")
    total, count = given
    if not isinstance(total, torch.Tensor) or total.dim():
        words = "the mean or the sum of them is not taken" if _is_vector(total) else "no tensor []"
        raise JobError(
            f"the loss returned {_describe(total)} as its sum ({words}); it must return {RETURN}"
        )
    if isinstance(count, torch.Tensor) and count.dim() == 0:
        return total, count.detach() if count.requires_grad else count
    if isinstance(count, bool) or not hasattr(count, "__float__") or _is_vector(count):
        raise JobError(f"the loss returned {_describe(count)} as its count; it must be a number")
    return total, count if isinstance(count, int) else float(count)


def _is_vector(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"one tensor of shape {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return "None" if value is None else f"a {type(value).__name__}"
