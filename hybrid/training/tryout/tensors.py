"""This module looks at a model's parameters and buffers as they are, before anything runs."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ...models.layers import Layers
from .finding import Finding, list_names
from .nested import is_float

WHOLE = (torch.float32,)  # what parameters are kept in; the precision of the job is another thing


def check_tensors(given: str, layers: Layers) -> list[Finding]:
    """Find parameters and buffers that no run, or not every strategy, can train.

    given: how a message names the model. The tensors may be on the meta device."""
    named = layers.tensors()
    parameters = {n: t for n, t in named.items() if isinstance(t, nn.Parameter)}
    buffers = {n: t for n, t in named.items() if n not in parameters}
    return [
        *_dtypes(given, parameters),
        *_sparse(given, layers),
        *_not_finite(given, parameters, buffers),
    ]


def _dtypes(given: str, parameters: dict[str, nn.Parameter]) -> list[Finding]:
    """Find trained parameters in another dtype than fp32; a frozen one never meets an optimizer."""
    wrong = {n: p for n, p in parameters.items() if p.requires_grad and p.dtype not in WHOLE}
    if not wrong:
        return []
    first = next(iter(wrong.values())).dtype
    same = [name for name, p in wrong.items() if p.dtype == first]
    mend = "train.precision says what layers compute in"
    if first.is_complex:
        mend = "keep the real and the imaginary part, as torch.view_as_real gives them"
    noun, verb = ("parameter", "is") if len(same) == 1 else ("parameters", "are")
    dtype = str(first).removeprefix("torch.")
    return [
        Finding(
            f"{given}: {noun} {list_names(same)} {verb} {dtype}; valid: float32 ({mend})",
            fatal=True,
        )
    ]


def _sparse(given: str, layers: Layers) -> list[Finding]:
    """Find embeddings whose gradients would be sparse, which no optimizer of a job takes."""
    names = _names_of(layers, lambda m: bool(getattr(m, "sparse", False)))
    if not names:
        return []
    words = f"{list_names(names)} {'has' if len(names) == 1 else 'have'} sparse=True"
    mend = (
        "no norm is taken of sparse gradients, nor are they summed over ranks; valid: sparse=False"
    )
    return [Finding(f"{given}: {words}: {mend}", fatal=True)]


def _names_of(layers: Layers, is_one: Callable[[nn.Module], bool]) -> list[str]:
    """Name the embeddings that pass a test, as their parameters are named."""
    owners = [m for m in layers.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    held = {m.weight: type(m).__name__ for m in owners if is_one(m)}
    names = layers.names().items()
    return [f"{n.rpartition('.')[0]} ({held[p]})" for p, n in names if p in held]


def _not_finite(
    given: str, parameters: dict[str, nn.Parameter], buffers: dict[str, torch.Tensor]
) -> list[Finding]:
    """Find trained parameters that are not finite, and buffers that are not numbers.

    An infinite buffer is an ordinary mask of attention."""
    found = []
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    wrong = _failing(trained, lambda t: bool(t.isfinite().all()))
    if wrong:
        text = f"{given}: parameter {list_names(wrong)} starts with numbers that are not finite"
        found.append(Finding(f"{text}; initialise it", fatal=True))
    wrong = _failing(buffers, lambda t: not bool(t.isnan().any()))
    if wrong:
        text = f"{given}: buffer {list_names(wrong)} holds nan at the start"
        found.append(Finding(f"{text}; initialise it, if anything reads it"))
    return found


def _failing(
    tensors: Mapping[str, torch.Tensor], holds: Callable[[torch.Tensor], bool]
) -> list[str]:
    return [n for n, t in tensors.items() if is_float(t) and not holds(t.detach())]
