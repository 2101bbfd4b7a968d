"""This module looks at the loss: a sum over samples, its count, and what its gradient reaches."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...engines.counting import TargetCounter
from ...job.errors import JobError
from .finding import STAGED, Finding, list_names
from .nested import NoRows, is_float, map_tensors, take_rows, tensors_in
from .passes import split_rows
from .trial import Trial

# Relative to the sum of each sample's loss. A sum over a batch and the sum of its halves' differ by
# the rounding of fp32: at most 1e-6 for 8 samples of 1,024 targets each. A mean is off by a half.
TOLERANCE = 1e-5


@torch.no_grad()
def check_loss(trial: Trial, output: Any) -> list[Finding]:
    """Find a loss that is no sum over samples, or that counts otherwise than it sums.

    output: what the model gave for the batch. Only the loss is called, on parts of the output, so
    that nothing here hangs on what the model does."""
    total, count = trial.take_loss(output, trial.batch.target)
    again, _ = trial.take_loss(output, trial.batch.target)
    size = _size(trial, output, total)
    if abs(float(total) - float(again)) > TOLERANCE * size:
        text = "the loss draws random numbers of its own: each strategy draws others"
        return [Finding(f"{trial.model_name}: {text}; draw them in the data set")]
    parts = list(_parts(trial, output))
    if len(parts) < 2:
        return []
    found = _not_a_sum(trial, output, float(total), parts, size)
    return found or [*_miscounted(trial, count, parts), *_counted_ahead(trial, output, count)]


def _parts(trial: Trial, output: Any) -> Iterator[tuple[int, float, float]]:
    """Give the samples, the loss and the count of each of two parts of the batch."""
    total = len(trial.ids)
    for rows in filter(None, split_rows(total)):
        try:
            some = take_rows(output, rows, total), take_rows(trial.batch.target, rows, total)
        except NoRows:
            return
        loss_sum, count = trial.take_loss(*some)
        yield len(rows), float(loss_sum), float(count)


def _size(trial: Trial, output: Any, total: torch.Tensor) -> float:
    """Return the sum of the sizes of each sample's loss, by which rounding is measured."""
    sizes, count = [], len(trial.ids)
    for row in range(count):
        try:
            some = (take_rows(v, [row], count) for v in (output, trial.batch.target))
            sizes.append(abs(float(trial.take_loss(*some)[0])))
        except (NoRows, JobError):  # a loss need not take a single sample
            continue
    return max(abs(float(total)), math.fsum(size for size in sizes if math.isfinite(size)))


def _not_a_sum(
    trial: Trial,
    output: Any,
    total: float,
    parts: Sequence[tuple[int, float, float]],
    size: float,
) -> list[Finding]:
    expected = math.fsum(loss for _, loss, _ in parts)
    if abs(total - expected) <= TOLERANCE * size:
        return []
    samples = sum(n for n, _, _ in parts)
    shown = " and ".join(f"{loss:.5g} of {n}" for n, loss, _ in parts)
    text = f"the loss of {samples} samples together is {total:.5g}, that of its parts {shown}"
    for weights in ([n for n, _, _ in parts], [c for _, _, c in parts]):
        mean = math.fsum(w * loss for w, (_, loss, _) in zip(weights, parts, strict=True))
        if abs(total * sum(weights) - mean) <= TOLERANCE * size * sum(weights):
            mend = "it is a mean where a sum is asked for: use reduction='sum'"
            return [Finding(f"{trial.model_name}: {text}: {mend}", fatal=True)]
    if words := _broadcast(output, trial.batch.target):
        return [Finding(f"{trial.model_name}: {text}: {words}", fatal=True)]
    mend = "it mixes samples, and no strategy that cuts the batch could compute it"
    return [Finding(f"{trial.model_name}: {text}: {mend}; sum a loss of each sample", fatal=True)]


def _broadcast(output: Any, target: Any) -> str | None:
    """Say that an output and a target of one size and another shape were broadcast."""
    if not (isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor)):
        return None
    one, other = list(output.shape), list(target.shape)
    if one == other or output.numel() != target.numel():
        return None
    whole = list(torch.broadcast_shapes(output.shape, target.shape))
    mend = "output.squeeze(-1)" if len(one) > len(other) else "output.unsqueeze(-1)"
    return (
        f"an output of shape {one} and a target of shape {other} are broadcast to {whole}, so that "
        f"each sample meets the targets of all; make the shapes the same, such as by {mend}"
    )


def _miscounted(
    trial: Trial, count: Any, parts: Sequence[tuple[int, float, float]]
) -> list[Finding]:
    expected = math.fsum(c for _, _, c in parts)
    if abs(float(count) - expected) <= TOLERANCE * max(float(count), expected):
        return []
    samples = sum(n for n, _, _ in parts)
    shown = " and ".join(f"{c:g} for {n}" for n, _, c in parts)
    text = f"the loss counts {float(count):g} for {samples} samples, {shown} of them"
    mend = "a count adds up over samples: return the number of targets that the sum is over"
    return [Finding(f"{trial.model_name}: {text}; {mend}", fatal=True)]


def _counted_ahead(trial: Trial, output: Any, count: Any) -> list[Finding]:
    """Find a loss that counts other targets than an engine does before it has an output."""
    try:
        counter = TargetCounter(trial.loss, torch.device("cpu"))
        counter.see(output, trial.batch.target)
        ahead = float(counter.count(trial.batch))
    except Exception:  # the engines' own way to count; what stands in its way, they say
        return []
    if abs(ahead - float(count)) <= TOLERANCE * max(ahead, float(count)):
        return []
    text = f"the loss counted {float(count):g} targets of {len(trial.ids)} samples, where "
    text += f"{ahead:g} are not -100"
    mend = "mark targets that do not count by -100, or give the loss a method count(target)"
    return [Finding(f"{trial.model_name}: {text}; {mend}", fatal=True)]


def check_reach(trial: Trial, output: Any) -> list[Finding]:
    """Find trained tensors that the loss reaches by itself, not through the model's output.

    output: with a graph, which is cut here: what the loss reaches beyond is its own."""
    cut = map_tensors(output, lambda t: t.detach().clone().requires_grad_(is_float(t)))
    mine = set(tensors_in(cut))
    loss_sum, _ = trial.take_loss(cut, trial.batch.target)
    reached = [leaf for leaf in leaves_behind(loss_sum) if leaf not in mine]
    if not any(leaf in mine for leaf in leaves_behind(loss_sum)):
        text = "the loss has no gradient for the model's output"
        return [Finding(f"{trial.model_name}: {text}: is it detached?", fatal=True)]
    given = trial.batch.target, trial.batch.input
    strange = [t for t in reached if t not in trial.names and t not in set(tensors_in(given))]
    own = [trial.names[t] for t in reached if t in trial.names]  # type: ignore[index]
    return [*_tell_strangers(trial, strange), *_tell_own(trial, own)]


def _tell_strangers(trial: Trial, strange: list[torch.Tensor]) -> list[Finding]:
    """Tell of tensors that no optimizer would train, but for those the loss offers to train."""
    offered = set(trial.loss.parameters()) if isinstance(trial.loss, nn.Module) else set()
    strange = [tensor for tensor in strange if tensor not in offered]
    if not strange:
        return []
    shown = [_name(trial.loss, t) or f"a tensor of shape {list(t.shape)}" for t in strange]
    text = f"the loss reaches {list_names(shown)}, which is trained and no layer's"
    mend = "no optimizer and no checkpoint would have it; put it into a layer"
    return [Finding(f"{trial.model_name}: {text}: {mend}", fatal=True)]


def _tell_own(trial: Trial, own: list[str]) -> list[Finding]:
    if not own:
        return []
    text = f"the loss reads the layers' own weights ({list_names(own)}), which are whole only where"
    mend = "no strategy cuts or shards them; compute that part in a layer, and return it"
    return [Finding(f"{trial.model_name}: {text} {mend}", ("fsdp", "zero3", *STAGED), fatal=True)]


def _name(value: Any, wanted: torch.Tensor, depth: int = 3) -> str | None:
    """Return the name by which a function's code knows a tensor: a closure's, or a global's.

    depth: how many functions, or other objects, may lie between."""
    for name, held in _names_in(value).items():
        if held is wanted:
            return name
        if isinstance(held, nn.Module):
            for inner, parameter in held.named_parameters():
                if parameter is wanted:
                    return f"{name}.{inner}"
        if depth and (callable(held) or isinstance(held, (list, tuple))):
            inner_name = _name(held, wanted, depth - 1)
            if inner_name:
                return inner_name
    return None


def _names_in(value: Any) -> dict[str, Any]:
    """Return what a function's code, or an object, knows by names."""
    if isinstance(value, (list, tuple)):
        return {str(i): held for i, held in enumerate(value)}
    if isinstance(value, type):
        return {}
    found = dict(getattr(value, "__dict__", {}))
    function = getattr(value, "__func__", value)
    if code := getattr(function, "__code__", None):
        spaces = function.__globals__
        found |= {name: spaces[name] for name in code.co_names if name in spaces}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            with contextlib.suppress(ValueError):  # a cell may be empty
                found[name] = cell.cell_contents
    if owner := getattr(value, "__self__", None):
        found |= dict(getattr(owner, "__dict__", {}))
    return found


def leaves_behind(tensor: torch.Tensor) -> list[torch.Tensor]:
    """List the leaf tensors in the graph of a tensor, each once."""
    leaves, nodes, todo = dict[torch.Tensor, None](), set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        if hasattr(node, "variable"):
            leaves[node.variable] = None
        todo += [following for following, _ in node.next_functions]
    return list(leaves)
