"""This module looks at one backward: parameters without a gradient, and gradients not finite."""

from typing import Any

import torch

from ...job.errors import JobError, tell_error
from ...job.users_code import passes
from .finding import SEVERAL, STAGED, Finding, list_names
from .losses import leaves_behind
from .nested import tensors_in
from .trial import LARGE, Trial

MORE = 64  # samples that a parameter without a gradient gets another chance with
ZERO = ("zero1", "zero2", "zero3")
ALIKE = ("ddp", "fsdp", *ZERO)  # whose ranks all meet for the gradient of every parameter


def check_gradients(trial: Trial, output: Any, count: float) -> list[Finding]:
    """Take the gradients of the batch's mean loss, and find what is wrong with them.

    output: what the model gave for the batch, with its graph, which this frees."""
    total, _ = trial.take_loss(output, trial.batch.target)
    leaves = leaves_behind(total) if total.requires_grad else []
    if not any(leaf in trial.names for leaf in leaves):
        text = "no parameter gets a gradient from the loss"
        return [Finding(f"{trial.model_name}: {text}: is the output detached?", fatal=True)]
    try:
        (total / max(count, 1.0)).backward()
    except BaseException as error:  # a user's own autograd function may raise anything
        if passes(error):
            raise
        raise JobError(f"{trial.model_name}: backward raised {tell_error(error)}") from error
    # Another pass can change buffers that this graph holds, so it comes after the backward.
    found = [*_strangers(trial, leaves), *_wrong_gradients(trial)]
    if found:
        return found
    odd = _odd_parameters(trial)
    return [*_tell_branches(trial, odd), *_missing(trial, odd)]


def has_finite_gradients(trial: Trial, total: torch.Tensor) -> bool:
    """Return whether the gradients of a summed loss are finite; leaves none behind."""
    if not total.requires_grad:
        return True
    total.backward()
    gradients = [p.grad for p in trial.names if p.grad is not None]
    trial.free()
    return all(bool(g.isfinite().all()) for g in gradients if g.layout is torch.strided)


def _strangers(trial: Trial, leaves: list[torch.Tensor]) -> list[Finding]:
    """Find trained tensors in the model's graph that none of its layers registered.

    A leaf that a pass makes for itself, to take a gradient by its input, is another one each time.
    """
    given = set(tensors_in((trial.batch.input, trial.batch.target)))
    strange = {leaf for leaf in leaves if leaf not in trial.names and leaf not in given}
    if not strange:
        return []
    again = trial.forward(trial.batch.input, trial.ids)
    total, _ = trial.take_loss(again, trial.batch.target)
    strange &= set(leaves_behind(total))
    if not strange:
        return []
    shown = list_names([f"a tensor of shape {list(t.shape)}" for t in strange])
    text = f"the model reaches {shown}, which is trained and no layer's"
    mend = "no optimizer and no checkpoint would have it; make it an nn.Parameter of a layer"
    return [Finding(f"{trial.model_name}: {text}: {mend}", fatal=True)]


def _wrong_gradients(trial: Trial) -> list[Finding]:
    """Find gradients that are sparse, or not finite though the loss is."""
    gradients = {n: p.grad for p, n in trial.names.items() if p.grad is not None}
    sparse = [name for name, g in gradients.items() if g.layout is not torch.strided]
    if sparse:
        text = f"the gradient of {list_names(sparse)} is sparse"
        mend = "no norm is taken of it, nor is it summed over ranks; make it dense (sparse=False)"
        return [Finding(f"{trial.model_name}: {text}: {mend}", fatal=True)]
    wrong = [name for name, g in gradients.items() if not bool(g.isfinite().all())]
    if not wrong:
        return []
    text = f"the gradient of {list_names(wrong)} is not finite, though the loss is"
    mend = "look for a root, a logarithm or a norm at zero"
    return [Finding(f"{trial.model_name}: {text}; {mend}", fatal=True)]


@torch.enable_grad()
def _reached(trial: Trial, batch: Any, ids: list[int]) -> set[torch.Tensor]:
    """Return the trained parameters that the loss of some samples reaches."""
    output = trial.forward(batch.input, ids)
    total, _ = trial.take_loss(output, batch.target)
    return {leaf for leaf in leaves_behind(total) if leaf in trial.names}


def _odd_parameters(trial: Trial) -> set[torch.Tensor]:
    """Return the parameters that some micro-batches use and others do not.

    Single samples show whether a model branches by its data at all. Micro-batches of the job's
    size, on two processes, show whether it would in a run."""
    if trial.sizes > LARGE or len(trial.ids) < 2:
        return set()
    try:
        single = [_reached(trial, trial.load([i]), [i]) for i in trial.ids]
        if all(found == single[0] for found in single):
            return set()
    except JobError:  # a batch norm may need two samples
        pass
    size, most = _micro_batch(trial), min(len(trial.samples), MORE)
    chunks = [list(range(i, i + size)) for i in range(0, most - size + 1, size)]
    found = [_reached(trial, trial.load(ids), ids) for ids in chunks]
    used = found[0].union(*found) if found else set()
    return {p for p in used if any(p not in one for one in found)}


def _micro_batch(trial: Trial) -> int:
    train = trial.job.train
    return max(1, train.global_batch // (2 * train.micro_batches))


def _tell_branches(trial: Trial, odd: set[torch.Tensor]) -> list[Finding]:
    if not odd:
        return []
    names, size = list_names([n for p, n in trial.names.items() if p in odd]), _micro_batch(trial)
    text = f"{trial.model_name}: some micro-batches of {size} samples use {names}, others do not"
    mend = "have every micro-batch use them, if only by adding 0 times their output"
    why = "ranks that take other branches wait for one another's gradients"
    return [Finding(f"{text}: {why}; {mend}", (*ALIKE, "2d"), fatal=True)]


def _missing(trial: Trial, odd: set[torch.Tensor]) -> list[Finding]:
    """Find trained parameters that get no gradient, from the batch nor from more samples.

    torch's optimizers leave them as they are. DDP waits for their gradients. DeepSpeed takes zeros
    for these, so that weight decay moves the parameters there."""
    missing = _without(trial, odd)
    if missing and len(trial.samples) > len(trial.ids) and trial.sizes < LARGE:
        _more_samples(trial)
        missing = _without(trial, odd)
    if not missing:
        return []
    noun, verb = ("parameter", "gets") if len(missing) == 1 else ("parameters", "get")
    text = f"{trial.model_name}: trained {noun} {list_names(missing)} {verb} no gradient"
    mend = "use them in forward, or freeze them by requires_grad_(False)"
    found = [Finding(f"{text}, and DDP waits for one; {mend}", ("ddp",), fatal=True)]
    if trial.job.optimizer.weight_decay > 0:
        why = "and DeepSpeed decays them all the same, as single does not"
        found.append(Finding(f"{text}, {why}; {mend}", (*ZERO, *STAGED), True, "deepspeed"))
    barred = [name for one in found for name in one.strategies]
    others = tuple(name for name in ("single", *SEVERAL) if name not in barred)
    text += f", so that training leaves them as they are; {mend}"
    found.append(Finding(text, others))
    if set(STAGED) & set(barred):
        found.append(Finding(text, STAGED, staged_by="torch"))
    return found


def _without(trial: Trial, odd: set[torch.Tensor]) -> list[str]:
    trained = [(p, name) for p, name in trial.names.items() if p.requires_grad and p not in odd]
    return [name for p, name in trained if p.grad is None]


def _more_samples(trial: Trial) -> None:
    """Add the gradients of further samples: another one may take another branch."""
    first = len(trial.ids)
    ids = list(range(first, min(len(trial.samples), first + MORE)))
    batch = trial.load(ids)
    trial.take_loss(trial.forward(batch.input, ids), batch.target)[0].backward()
